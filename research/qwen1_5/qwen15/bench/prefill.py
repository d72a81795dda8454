"""How fast prompts are taken in, from token ids to the first new token; beside the peak of the arithmetic."""

from __future__ import annotations

import functools
from typing import Any, Callable, Dict, List, Mapping, Optional, Sequence, Union

from ..command_line import Parser
from . import hf, options, report, rounds, work
from .ours import Ours, random_prompts
from .probes import Probes
from .report import Column, number, text
from .start import start

WHAT = "prefill"


def parser() -> Parser:
    """The flags."""
    made = Parser("qwen15 bench prefill", __doc__ or "", ["qwen15 bench prefill --tokens 128 512 2048"])
    made.add_argument("--tokens", type=options.positive, nargs="+", default=[512], metavar="N",
                      help="of the prompt (default 512)")
    options.add_checkpoint(made)
    options.add_run(made, WHAT, against=tuple(options.AGAINST))
    return made


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Measure every prompt length.

    Raises:
        UserError: arguments that cannot be, or something is not installed.
    """
    argv, args, plot = start(parser(), WHAT, argv)
    other = options.find_bfloat16(args) if args.against == "bfloat16" else None
    checkpoint = options.find_checkpoint(args)
    machine = Probes(args.threads)
    ours = Ours(checkpoint, machine.threads, max(args.tokens) + 1, 1)
    theirs = hf.HuggingFace(checkpoint, machine.threads) if args.against == "hf" else None
    others: Dict[str, Union[Ours, hf.HuggingFace]] = {}
    if theirs is not None:
        others["hf"] = theirs
    if other is not None:
        others["bfloat16"] = Ours(other, machine.threads, max(args.tokens) + 1, 1)
    rows = [_measure(ours, others, tokens, machine, checkpoint.computes_in, args.rounds) for tokens in args.tokens]
    facts = {"model": checkpoint.label, "dtype": checkpoint.dtype, "threads": machine.threads, "rounds": args.rounds,
             "kernels": machine.kernels, "against": theirs.note if theirs else None}
    report.show(WHAT, argv, facts, COLUMNS, rows, _bars(checkpoint, rows), plot)
    return 0


def _measure(ours: Ours, others: Mapping[str, Union[Ours, hf.HuggingFace]], tokens: int, machine: Probes, dtype: str,
             count: int) -> Dict[str, Any]:
    prompt: List[int] = random_prompts(1, tokens, ours.dims.vocab_size)[0].tolist()
    contenders: Dict[str, Callable[[], rounds.Timing]] = {
        name: functools.partial(one.prefill, prompt) for name, one in {"qwen15": ours, **others}.items()}
    samples = rounds.interleave(contenders, count,
                                lambda: {"bandwidth": machine.bandwidth(), "peak": machine.peak(dtype)})
    mine = samples["qwen15"]
    read = work.decode_bytes(ours.dims, dtype, 1, tokens, ours.quantised_bytes)
    flop = work.prefill_flop(ours.dims, tokens)
    whole_s = rounds.median_seconds(mine)
    return {"tokens": tokens, "ms": whole_s * 1e3, "tokens_per_s": tokens / whole_s,
           "own_ms": rounds.median_own_seconds(mine) * 1e3,
           "read_bytes": read, "flop": flop, **rounds.limits(mine, read, flop), "samples": rounds.as_json(samples),
           **rounds.compared(samples, tokens)}


COLUMNS = (
    Column("tokens", text("tokens")), Column("ms", number("ms")), Column("tokens/s", number("tokens_per_s")),
    Column("of it not kernels, ms", number("own_ms", ".2f")),
    Column("peak, GFLOP/s", number("peak_gflop_per_s", ".0f")),
    Column("of peak", number("of_peak", ".2f")), *report.COMPARED,
)


def _bars(checkpoint: options.BenchCheckpoint, rows: Sequence[Mapping[str, Any]]) -> report.Bars:
    series = {"qwen15": [row["tokens_per_s"] for row in rows]}
    if "hf_tokens_per_s" in rows[0]:
        series["transformers"] = [row["hf_tokens_per_s"] for row in rows]
    return report.Bars(f"Prefill, {checkpoint.label}, {checkpoint.dtype}", "tokens per second",
                       [f"{row['tokens']} tokens" for row in rows],
                       series, {"at the measured peak": [row["tokens_per_s"] / row["of_both"] for row in rows]})
