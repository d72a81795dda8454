"""How fast tokens come, whole steps from Python to the chosen token, beside what the machine allows."""

from __future__ import annotations

import argparse
from typing import Any, Dict, Mapping, Sequence

from ..command_line import Parser, positive
from . import options, report, rounds, work
from .engines import Engines
from .ours import random_prompts
from .report import Column, Measured, number, text


def parser() -> Parser:
    """The flags."""
    made = Parser("qwen15 bench decode", __doc__ or "",
                  ["qwen15 bench decode --size 0.5b",
                   "qwen15 bench decode --checkpoint FOLDER --batch 1 8 --context 32 2048 --against hf",
                   "qwen15 bench decode --dtype int4 --batch 1 4 8 --against bfloat16"])
    made.add_argument("--batch", type=positive, nargs="+", default=[1], metavar="B",
                      help="sequences at once (default 1)")
    made.add_argument("--context", type=positive, nargs="+", default=[32], metavar="N",
                      help="tokens of the prompt (default 32)")
    made.add_argument("--new_tokens", type=options.at_least_two, default=128, metavar="N",
                      help="tokens of each sequence in a run (default 128)")
    options.add_checkpoint(made)
    options.add_run(made, "decode", against=tuple(options.AGAINST))
    return made


def run(args: argparse.Namespace) -> Measured:
    """Measure every batch size at every context length.

    Raises:
        UserError: arguments that cannot be, or something is not installed.
    """
    engines = Engines(args, max(args.context) + args.new_tokens, max(args.batch))
    rows = [_row(engines, batch, context, args.new_tokens) for context in args.context for batch in args.batch]
    return Measured({**engines.facts, "against": engines.note}, COLUMNS, rows, _bars(engines.checkpoint, rows))


def _row(engines: Engines, batch: int, context: int, new_tokens: int) -> Dict[str, Any]:
    ours, dtype = engines.ours, engines.checkpoint.computes_in
    prompts = random_prompts(batch, context, ours.vocab_size)
    samples = engines.take_turns(lambda engine: engine.decode(prompts, new_tokens).run)
    mine = samples["qwen15"]
    middle = context + new_tokens / 2  # average number of tokens in the cache
    read = work.decode_bytes(ours.dims, dtype, batch, middle, ours.quantised_bytes)
    flop = work.decode_flop(ours.dims, batch, middle)
    step_s = rounds.median_seconds(mine)
    return {"batch": batch, "context": context, "new_tokens": new_tokens, "step_ms": step_s * 1e3,
            "tokens_per_s": batch / step_s, "own_ms": rounds.median_own_seconds(mine) * 1e3, "bytes_per_step": read,
            "flop_per_step": flop, **rounds.limits(mine, read, flop), "samples": rounds.as_json(samples),
            **rounds.compared(samples, batch)}


COLUMNS = (
    Column("batch", text("batch")), Column("context", text("context")), Column("ms a step", number("step_ms", ".2f")),
    Column("tokens/s", number("tokens_per_s")), Column("of it not kernels, ms", number("own_ms", ".2f")),
    *report.LIMITS, *report.COMPARED,
)


def _bars(checkpoint: options.BenchCheckpoint, rows: Sequence[Mapping[str, Any]]) -> report.Bars:
    return report.Bars(f"Decode, {checkpoint.label}, {checkpoint.dtype}", "tokens per second",
                       [f"batch {row['batch']}\ncontext {row['context']}" for row in rows],
                       report.speeds(rows, "tokens_per_s", "transformers"),
                       {"what bandwidth and peak allow": [row["tokens_per_s"] / row["of_both"] for row in rows]})
