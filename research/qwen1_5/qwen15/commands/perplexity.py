"""How well a model predicts a text, as sliding-window perplexity: `qwen15 perplexity TEXT_FILE`."""

from __future__ import annotations

import json
import math
import time
from typing import Dict, Iterator, List, NamedTuple, Optional, Sequence, Tuple

from .. import interrupts  # noqa: F401  (before everything that imports NumPy, see there)
from ..command_line import Parser, whole
from ..config.describe import describe
from ..config.flags import add_flags
from ..config.load import config_of
from ..errors import EXIT_OK, UserError
from ..generation.request import Request
from ..generation.session import Session
from ..reporting import LEVELS, begin, set_encoding
from ..text_file import read_text

LONGEST_WINDOW = 1024
"""Tokens of a window when nothing is said, or seq_length where that is less."""


class Window(NamedTuple):
    """Tokens `first:last` of a text; its last `new` ones were in no window before."""

    first: int
    last: int
    new: int


class Measured(NamedTuple):
    """What a text came to.

    Attributes:
        perplexity: exp of the mean negative log likelihood, a window's mean counting once for each new token but one.
        nats: that mean, in nats a token.
        tokens: how often means counted in all.
    """

    perplexity: float
    nats: float
    tokens: int


def windows(count: int, size: int, stride: int) -> Iterator[Window]:
    """The windows over `count` tokens: `size` tokens each, `stride` apart, the last one ends with the text."""
    seen = 0
    for first in range(0, count, stride):
        last = min(first + size, count)
        yield Window(first, last, last - seen)
        seen = last
        if last == count:
            return


def combine(means: Sequence[Tuple[Window, float]]) -> Measured:
    """Perplexity from each window's mean negative log likelihood of its new tokens.

    Defined as in Hugging Face's guide to the perplexity of models of fixed length: a window's mean has the weight of
    its new tokens less one, since the first token of a window is not predicted.
    """
    tokens = sum(window.new - 1 for window, _ in means)
    nats = sum((window.new - 1) * mean for window, mean in means) / tokens
    return Measured(math.exp(nats), nats, tokens)


def measure(session: Session, ids: Sequence[int], size: int, stride: int) -> Optional[Measured]:
    """The perplexity of a text on an open session; None on the ranks that are not the first, which know no logits.

    Raises:
        UserError: logits that are not finite.
    """
    from tqdm import tqdm

    assert session.engine is not None
    planned = list(windows(len(ids), size, stride))
    requests = [Request(tuple(ids[w.first:w.last]), w.last - w.first, max_new_tokens=0, prompt_logprobs=0,
                        label=f"tokens {w.first} to {w.last - 1}") for w in planned]
    means: List[Tuple[Window, float]] = []
    is_first = session.rank == 0
    with tqdm(total=len(ids), desc="scoring", unit=" tokens", leave=False, dynamic_ncols=True,
              disable=None if is_first else True) as bar:
        for step in session.engine.generate(requests):
            if step.error is not None:
                raise step.error
            window = planned[step.request]
            bar.update(window.new)
            if step.prompt_logprobs is not None:
                scored = [place.chosen for place in step.prompt_logprobs][-window.new:]
                means.append((window, -math.fsum(scored) / len(scored)))
    return combine(sorted(means)) if is_first else None


def parser() -> Parser:
    """The flags."""
    made = Parser("qwen15 perplexity", (
        "How well a model predicts a text: perplexity over windows that overlap, as transformers' guide defines it. "
        "Lower is better; compare checkpoints of one model on one text, such as bfloat16 and int4."),
        ["qwen15 perplexity text.txt --load_checkpoint models/Qwen1.5-0.5B-ms",
         "qwen15 perplexity text.txt --config predict_qwen1_5_7b.yaml --load_checkpoint models/7b-int4 --stride 256"])
    made.add_argument("text_file", metavar="TEXT_FILE", help="the text, UTF-8; - reads standard input")
    made.add_argument("--window", type=whole, metavar="N",
                      help=f"tokens of a window (default {LONGEST_WINDOW}, or seq_length where that is less)")
    made.add_argument("--stride", type=whole, metavar="N",
                      help="tokens from one window to the next (default half a window)")
    made.add_argument("--json", action="store_true", help="print one JSON object")
    made.add_argument("--log_level", choices=LEVELS, default="info", help="what is said on stderr (default info)")
    add_flags(made)
    return made


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Command line: prints the perplexity.

    Raises:
        UserError: whatever the user can mend.
    """
    args = parser().parse_args(argv)
    config = config_of(args)
    if args.print_config:
        print(describe(config))
        return EXIT_OK
    report = begin(args.log_level, config.notes)
    set_encoding(json=args.json)
    text = read_text(args.text_file)
    size, stride = _sizes(args.window, args.stride, config.model.seq_length)
    session = Session.prepare(config)
    ids = session.tokenizer.encode(text)
    if len(ids) < 3:
        raise UserError(f"{len(ids)} token(s) are too few to predict any", args.text_file, "Give a longer text.")
    session.open(report.info)
    start_s = time.perf_counter()
    measured = measure(session, ids, size, stride)
    if measured is None:
        return EXIT_OK
    seconds = time.perf_counter() - start_s
    count = len(list(windows(len(ids), size, stride)))
    if args.json:
        print(json.dumps(_as_json(args.text_file, measured, len(ids), count, size, stride, seconds, session.note)))
    else:
        print(f"perplexity {measured.perplexity:.4f}")
        report.info(f"{len(ids)} tokens in {count} window(s) of up to {size}, {stride} apart: "
                    f"{measured.nats:.5f} nats a token; {seconds:.1f} s, {len(ids) / seconds:.1f} tokens/s")
    return EXIT_OK


def _as_json(text: str, measured: Measured, tokens: int, count: int, size: int, stride: int, seconds: float,
             note: str) -> Dict[str, object]:
    return {"perplexity": measured.perplexity, "nats_per_token": measured.nats, "text": text, "tokens": tokens,
            "windows": count, "window": size, "stride": stride, "seconds": round(seconds, 3), "network": note}


def _sizes(window: Optional[int], stride: Optional[int], seq_length: int) -> Tuple[int, int]:
    size = min(LONGEST_WINDOW, seq_length) if window is None else window
    if size > seq_length:
        raise UserError(f"{size} tokens are more than seq_length {seq_length}", "--window", "Raise --seq_length.")
    if size < 3:
        raise UserError(f"{size} tokens are too few to predict any", "--window", "Give at least 3.")
    apart = max(1, size // 2) if stride is None else stride
    if apart < 1:
        raise UserError(f"{apart} tokens never reach the end", "--stride", "Give at least 1.")
    if apart > size:
        raise UserError(f"{apart} is more than the window of {size} tokens: some would be in no window", "--stride",
                        f"Give at most {size}.")
    return size, apart
