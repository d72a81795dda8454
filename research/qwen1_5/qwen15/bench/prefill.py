"""How fast prompts are taken in, from token ids to the first new token; beside the peak of the arithmetic."""

from __future__ import annotations

import argparse
import functools
from typing import Any, Dict, List, Mapping, Sequence

from ..command_line import Parser, positive
from . import options, report, rounds, work
from .engines import Engines
from .ours import random_prompts
from .report import Column, Measured, number, text


def parser() -> Parser:
    """The flags."""
    made = Parser("qwen15 bench prefill", __doc__ or "", ["qwen15 bench prefill --tokens 128 512 2048"])
    made.add_argument("--tokens", type=positive, nargs="+", default=[512], metavar="N",
                      help="of the prompt (default 512)")
    options.add_checkpoint(made)
    options.add_run(made, "prefill", against=tuple(options.AGAINST))
    return made


def run(args: argparse.Namespace) -> Measured:
    """Measure every prompt length.

    Raises:
        UserError: arguments that cannot be, or something is not installed.
    """
    engines = Engines(args, max(args.tokens) + 1, 1)
    rows = [_row(engines, tokens) for tokens in args.tokens]
    return Measured({**engines.facts, "against": engines.note}, COLUMNS, rows, _bars(engines.checkpoint, rows))


def _row(engines: Engines, tokens: int) -> Dict[str, Any]:
    ours = engines.ours
    prompt: List[int] = random_prompts(1, tokens, ours.vocab_size)[0].tolist()
    samples = engines.take_turns(lambda engine: functools.partial(engine.prefill, prompt))
    mine = samples["qwen15"]
    read = work.decode_bytes(ours.dims, engines.checkpoint.computes_in, 1, tokens, ours.quantised_bytes)
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
    return report.Bars(f"Prefill, {checkpoint.label}, {checkpoint.dtype}", "tokens per second",
                       [f"{row['tokens']} tokens" for row in rows],
                       report.speeds(rows, "tokens_per_s", "transformers"),
                       {"at the measured peak": [row["tokens_per_s"] / row["of_both"] for row in rows]})
