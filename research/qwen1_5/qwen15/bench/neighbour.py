"""Decoding beside a neighbour that keeps one core busy, against decoding alone, and against what the neighbour took."""

from __future__ import annotations

import argparse
import os
import signal
import statistics
import subprocess
import sys
import time
from typing import Any, Dict, List, Mapping, Sequence

from ..command_line import Parser, positive
from ..kernels import library
from ..machine import allowed_cpus
from . import options, report, rounds
from .engines import Engines
from .ours import Decode, Ours, random_prompts
from .report import Column, Measured, number, text

MARGIN = 0.10
"""What may be lost beside the neighbour's share of the machine."""
_BUSY = """
import ctypes, os, signal, sys
ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: a bench that is killed cannot end it, and it is stopped
if os.getppid() == int(sys.argv[2]):
    os.sched_setaffinity(0, {int(sys.argv[1])})
    print(flush=True)
    while True: pass
"""
_SETTLE_S = 0.05


class Neighbour:
    """A process that keeps one CPU busy while it is let.

    Args:
        cpu: its number.
    """

    def __init__(self, cpu: int):
        self._process = subprocess.Popen([sys.executable, "-c", _BUSY, str(cpu), str(os.getpid())],
                                         stdout=subprocess.PIPE)
        assert self._process.stdout is not None
        self._process.stdout.readline()
        self.rest()

    def work(self) -> None:
        """Keep the CPU busy from now on."""
        self._process.send_signal(signal.SIGCONT)

    def rest(self) -> None:
        """Stop until `work`."""
        self._process.send_signal(signal.SIGSTOP)

    def cpu_seconds(self) -> float:
        """What it has had of the CPU since it began."""
        with open(f"/proc/{self._process.pid}/stat", encoding="utf-8") as file:
            fields = file.read().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def close(self) -> None:
        """End it."""
        self._process.kill()
        self._process.communicate()


def parser() -> Parser:
    """The flags."""
    made = Parser("qwen15 bench neighbour", __doc__ or "", ["qwen15 bench neighbour --batch 1 8"])
    made.add_argument("--batch", type=positive, nargs="+", default=[1, 8], metavar="B",
                      help="sequences at once (default 1 8)")
    options.add_lengths(made, 64)
    options.add_checkpoint(made)
    options.add_run(made, "neighbour", against=())
    return made


def run(args: argparse.Namespace) -> Measured:
    """Measure every batch size alone and beside the neighbour, in turns.

    Raises:
        UserError: arguments that cannot be.
    """
    engines = Engines(args, args.context + args.new_tokens, max(args.batch))
    cpus = sorted(allowed_cpus())
    neighbour = Neighbour(cpus[0])
    try:
        rows = [_row(engines.ours, neighbour, batch, len(cpus), args.context, args.new_tokens, args.rounds)
                for batch in args.batch]
    finally:
        neighbour.close()
    facts = {**engines.facts, "new_tokens": f"answer {args.new_tokens}"}
    return Measured(facts, COLUMNS, rows, _bars(engines.checkpoint, rows))


def _row(ours: Ours, neighbour: Neighbour, batch: int, cpus: int, context: int, new_tokens: int, count: int
         ) -> Dict[str, Any]:
    decode = Decode(ours, random_prompts(batch, context, ours.vocab_size), new_tokens)
    shares: List[float] = []
    working: List[int] = []

    def beside() -> rounds.Timing:
        neighbour.work()
        try:
            time.sleep(_SETTLE_S)
            had_s, start_s = neighbour.cpu_seconds(), time.perf_counter()
            took = decode.run()
            shares.append((neighbour.cpu_seconds() - had_s) / (time.perf_counter() - start_s) / cpus)
            working.append(library.load().working_threads)
        finally:
            neighbour.rest()
        return took

    samples = rounds.interleave({"alone": decode.run, "beside": beside}, count, lambda: {})
    loss = statistics.median(1 - alone.seconds / close.seconds
                             for alone, close in zip(samples["alone"], samples["beside"]))
    share = statistics.median(shares[1:])
    alone_s, beside_s = (rounds.median_seconds(samples[name]) for name in ("alone", "beside"))
    return {"batch": batch, "alone_ms": alone_s * 1e3, "beside_ms": beside_s * 1e3,
            "alone_tokens_per_s": batch / alone_s, "beside_tokens_per_s": batch / beside_s, "loss": loss,
            "share": share, "allowed": share + MARGIN, "within": "yes" if loss <= share + MARGIN else "no",
            "working_threads": round(statistics.median(working[1:])), "samples": rounds.as_json(samples)}


COLUMNS = (
    Column("batch", text("batch")), Column("alone, ms a step", number("alone_ms", ".2f")),
    Column("beside, ms a step", number("beside_ms", ".2f")), Column("lost", number("loss", ".2f")),
    Column("the neighbour's share of the machine", number("share", ".2f")),
    Column("its share + 0.10", number("allowed", ".2f")), Column("within", text("within")),
    Column("threads at work at the end", text("working_threads")),
)


def _bars(checkpoint: options.BenchCheckpoint, rows: Sequence[Mapping[str, Any]]) -> report.Bars:
    return report.Bars(f"Decode beside a busy neighbour, {checkpoint.label}, {checkpoint.dtype}", "tokens per second",
                       [f"batch {row['batch']}" for row in rows],
                       {"alone": [row["alone_tokens_per_s"] for row in rows],
                        "beside": [row["beside_tokens_per_s"] for row in rows]},
                       {"alone, less the neighbour's share and 0.10":
                        [row["alone_tokens_per_s"] * (1 - row["allowed"]) for row in rows]})
