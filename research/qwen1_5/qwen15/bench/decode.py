"""How fast tokens come, whole steps from Python to the chosen token, beside what the machine allows."""

from __future__ import annotations

from typing import Any, Callable, Dict, List, Mapping, Optional, Sequence

from ..command_line import Parser
from . import hf, options, report, rounds, work
from .ours import Decode, Ours, random_prompts
from .probes import Probes
from .report import Column, number, text
from .start import start

WHAT = "decode"


def parser() -> Parser:
    """The flags."""
    made = Parser("qwen15 bench decode", __doc__ or "",
                  ["qwen15 bench decode --size 0.5b",
                   "qwen15 bench decode --checkpoint FOLDER --batch 1 8 --context 32 2048 --against hf",
                   "qwen15 bench decode --dtype int4 --batch 1 4 8 --against bfloat16"])
    made.add_argument("--batch", type=options.positive, nargs="+", default=[1], metavar="B",
                      help="sequences at once (default 1)")
    made.add_argument("--context", type=options.positive, nargs="+", default=[32], metavar="N",
                      help="tokens of the prompt (default 32)")
    made.add_argument("--new_tokens", type=options.at_least_two, default=128, metavar="N",
                      help="tokens of each sequence in a run (default 128)")
    options.add_checkpoint(made)
    options.add_run(made, WHAT, against=tuple(options.AGAINST))
    return made


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Measure every batch size at every context length.

    Raises:
        UserError: arguments that cannot be, or something is not installed.
    """
    argv, args, plot = start(parser(), WHAT, argv)
    other = options.find_bfloat16(args) if args.against == "bfloat16" else None
    checkpoint = options.find_checkpoint(args)
    machine = Probes(args.threads)
    longest = max(args.context) + args.new_tokens
    ours = Ours(checkpoint, machine.threads, longest, max(args.batch))
    theirs = hf.HuggingFace(checkpoint, machine.threads) if args.against == "hf" else None
    plain = Ours(other, machine.threads, longest, max(args.batch)) if other is not None else None

    def probe() -> Dict[str, float]:
        return {"bandwidth": machine.bandwidth(), "peak": machine.peak(checkpoint.computes_in)}

    rows: List[Dict[str, Any]] = []
    for context in args.context:
        for batch in args.batch:
            prompts = random_prompts(batch, context, ours.dims.vocab_size)
            decode = Decode(ours, prompts, args.new_tokens)
            contenders: Dict[str, Callable[[], rounds.Timing]] = {"qwen15": decode.run}
            if theirs is not None:
                contenders["hf"] = hf.HuggingFaceDecode(theirs, prompts, args.new_tokens).run
            if plain is not None:
                contenders["bfloat16"] = Decode(plain, prompts, args.new_tokens).run
            samples = rounds.interleave(contenders, args.rounds, probe)
            rows.append(_row(ours, checkpoint.computes_in, batch, context, args.new_tokens, samples))
    facts = {"model": checkpoint.label, "dtype": checkpoint.dtype, "threads": machine.threads, "rounds": args.rounds,
             "kernels": machine.kernels, "against": theirs.note if theirs else None}
    report.show(WHAT, argv, facts, COLUMNS, rows, _bars(checkpoint, rows), plot)
    return 0


def _row(ours: Ours, dtype: str, batch: int, context: int, new_tokens: int,
         samples: Mapping[str, Sequence[rounds.Sample]]) -> Dict[str, Any]:
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
    Column("bandwidth, GB/s", number("bandwidth_gb_per_s")), Column("of bandwidth", number("of_bandwidth", ".2f")),
    Column("peak, GFLOP/s", number("peak_gflop_per_s", ".0f")), Column("of peak", number("of_peak", ".2f")),
    Column("of what both allow", number("of_both", ".2f")),
    *report.COMPARED,
)


def _bars(checkpoint: options.BenchCheckpoint, rows: Sequence[Mapping[str, Any]]) -> report.Bars:
    series = {"qwen15": [row["tokens_per_s"] for row in rows]}
    if "hf_tokens_per_s" in rows[0]:
        series["transformers"] = [row["hf_tokens_per_s"] for row in rows]
    return report.Bars(f"Decode, {checkpoint.label}, {checkpoint.dtype}", "tokens per second",
                       [f"batch {row['batch']}\ncontext {row['context']}" for row in rows], series,
                       {"what bandwidth and peak allow": [row["tokens_per_s"] / row["of_both"] for row in rows]})
