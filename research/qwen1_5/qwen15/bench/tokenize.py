"""How fast text becomes tokens, beside transformers' Qwen2TokenizerFast on the same vocabulary."""

from __future__ import annotations

import argparse
import functools
import glob
import os
import random
import sysconfig
from typing import Any, Callable, Dict, List, Mapping, Sequence

from ..command_line import Parser, positive
from ..errors import EXIT_FAILED, UserError
from ..text_file import read_text
from . import options, report, rounds
from .kernels import repeated
from .report import Column, Measured, number, text

_DEFAULT_CHARACTERS = 2_000_000
_MESSAGE_CHARACTERS = 1500


def parser() -> Parser:
    """The flags."""
    made = Parser("qwen15 bench tokenize", __doc__ or "",
                  ["qwen15 bench tokenize FOLDER --against hf"], usage="FOLDER [flags]")
    made.add_argument("vocabulary", metavar="FOLDER", help="with vocab.json and merges.txt")
    made.add_argument("--text", nargs="+", metavar="FILE",
                      help="UTF-8 text (default: Python's own library, and Chinese words at random)")
    made.add_argument("--characters", type=positive, default=_DEFAULT_CHARACTERS, metavar="N",
                      help=f"of each kind of text at most (default {_DEFAULT_CHARACTERS})")
    options.add_run(made, "tokenize", threads=False)
    return made


def run(args: argparse.Namespace) -> Measured:
    """Measure one long text and the same text in messages.

    Raises:
        UserError: arguments that cannot be, transformers is not installed, or the two tokenizers disagree.
    """
    from ..text.tokenizer import Qwen2Tokenizer

    files = [os.path.join(args.vocabulary, name) for name in ("vocab.json", "merges.txt")]
    ours = Qwen2Tokenizer.from_files(files[0], files[1], {})
    encoders: Dict[str, Any] = {"qwen15": ours}
    if args.against:
        encoders["hf"] = _fast(files)
    texts = {os.path.basename(path): read_text(path) for path in args.text} if args.text else {
        "code and English": _code(), "Chinese": _chinese(ours, args.characters)}
    rows: List[Dict[str, Any]] = []
    for name, whole in texts.items():
        whole = whole[:args.characters]
        messages = [whole[place:place + _MESSAGE_CHARACTERS] for place in range(0, len(whole), _MESSAGE_CHARACTERS)]
        one_text = {who: functools.partial(encoder.encode, whole) for who, encoder in encoders.items()}
        in_messages = {who: functools.partial(_each, encoder, messages) for who, encoder in encoders.items()}
        for form, calls in (("one text", one_text), ("messages", in_messages)):
            rows.append(_measure(f"{name}, {form}", len(whole.encode()), calls, args.rounds))
    return Measured({"vocabulary": len(ours), "rounds": args.rounds}, COLUMNS, rows, _bars(rows))


def _fast(files: Sequence[str]) -> Any:
    try:
        import transformers
    except ImportError:
        raise UserError("transformers is not installed", where="--against hf",
                        fix="Run: pip install transformers") from None
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    return transformers.Qwen2TokenizerFast(*files, additional_special_tokens=["<|im_start|>", "<|im_end|>"])


def _each(encoder: Any, messages: Sequence[str]) -> Any:
    return encoder(messages)["input_ids"]


def _measure(name: str, nbytes: int, calls: Mapping[str, Callable[[], Any]], count: int) -> Dict[str, Any]:
    results = {who: call() for who, call in calls.items()}
    if "hf" in results and list(results["hf"]) != list(results["qwen15"]):
        raise UserError(f"the two tokenizers disagree on {name}", exit_code=EXIT_FAILED)
    samples = rounds.interleave({who: repeated(call) for who, call in calls.items()}, count, lambda: {})
    mine = samples["qwen15"]
    row = {"text": name, "mb": nbytes / 1e6, "mb_per_s": nbytes / 1e6 / rounds.median_seconds(mine),
           "samples": rounds.as_json(samples)}
    if "hf" in samples:
        row.update(hf_mb_per_s=nbytes / 1e6 / rounds.median_seconds(samples["hf"]),
                   ratio_hf=rounds.ratio(mine, samples["hf"]))
    return row


def _code() -> str:
    parts = []
    for path in sorted(glob.glob(os.path.join(sysconfig.get_path("stdlib"), "*.py"))):
        with open(path, encoding="utf-8", errors="replace") as file:
            parts.append(file.read())
    return "".join(parts)


def _chinese(tokenizer: Any, characters: int) -> str:
    chance = random.Random(0)
    spelt = (tokenizer.token_bytes(index).decode("utf-8", "ignore") for index in range(tokenizer.vocab_size))
    words = [word for word in spelt if word and all("\u4e00" <= c <= "\u9fff" for c in word)] or ["中文"]
    parts = (chance.choice(words) + chance.choice(("", "", "", "，", "。", "、")) for _ in range(characters))
    return "".join(parts)


COLUMNS = (
    Column("text", text("text")), Column("MB", number("mb", ".2f")), Column("MB/s", number("mb_per_s", ".1f")),
    Column("Qwen2TokenizerFast, MB/s", number("hf_mb_per_s", ".1f")),
    Column("times transformers", number("ratio_hf", ".1f")),
)


def _bars(rows: Sequence[Dict[str, Any]]) -> report.Bars:
    return report.Bars("Text to tokens", "megabytes per second", [row["text"].replace(", ", ",\n") for row in rows],
                       report.speeds(rows, "mb_per_s", "Qwen2TokenizerFast"))
