"""How long a checkpoint takes to be ready, and the peak memory of a short run; a fresh process for each."""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any, Dict, List, Mapping, Sequence

from ..command_line import Parser, positive
from . import child, hf, options, report
from .probes import Probes
from .report import Column, Measured, gigabytes, number, text

MEMORY_FACTOR, MEMORY_PLUS_BYTES = 1.25, 600_000_000
"""The peak that is aimed at: so many times the checkpoint, and so much for Python and MindSpore."""


def parser() -> Parser:
    """The flags."""
    made = Parser("qwen15 bench load", __doc__ or "", ["qwen15 bench load --checkpoint FOLDER --against hf"])
    made.add_argument("--prompt", type=positive, default=512, metavar="N",
                      help="tokens of the prompt that is run (default 512)")
    made.add_argument("--new_tokens", type=options.at_least_two, default=16, metavar="N",
                      help="tokens after it (default 16)")
    options.add_checkpoint(made)
    options.add_run(made, "load")
    return made


def run(args: argparse.Namespace) -> Measured:
    """Measure loading.

    Raises:
        UserError: arguments that cannot be, something is not installed, or a process failed.
    """
    if args.against:
        hf.check_installed()
    checkpoint = options.find_checkpoint(args)
    threads = Probes(args.threads).threads
    nbytes = sum(path.stat().st_size for path in Path(checkpoint.path).glob("*.safetensors"))
    taken: Dict[str, List[Dict[str, float]]] = {name: [] for name in ("qwen15",) + (("hf",) if args.against else ())}
    for number_ in range(args.rounds + 1):
        for name in taken:
            result = _child(name, checkpoint, threads, args)
            if number_ > 0:  # the first round brings the files into the page cache
                taken[name].append(result)
    rows = [{"who": name, **{key: statistics.median(result[key] for result in results) for key in results[0]},
             "checkpoint_bytes": nbytes, "memory_goal_bytes": MEMORY_FACTOR * nbytes + MEMORY_PLUS_BYTES,
             "samples": results} for name, results in taken.items()]
    facts = {"model": checkpoint.label, "dtype": checkpoint.dtype, "threads": threads, "rounds": args.rounds}
    return Measured(facts, COLUMNS, rows, _bars(checkpoint, rows))


def _child(who: str, checkpoint: options.BenchCheckpoint, threads: int, args: argparse.Namespace) -> Dict[str, float]:
    command = [sys.executable, "-m", "qwen15.bench.load_child", who, *checkpoint, str(threads), str(args.prompt),
               str(args.new_tokens)]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, universal_newlines=True,
                          env=child.environment())
    child.check(done.returncode, done.stderr, "the process that loads it", who)
    return json.loads(done.stdout.strip().splitlines()[-1])


COLUMNS = (
    Column("", text("who")), Column("imports, s", number("import_s", ".2f")),
    Column("imported to ready, s", number("ready_s", ".2f")),
    Column("ready to first token, s", number("first_token_s", ".2f")),
    Column("checkpoint, GB", gigabytes("checkpoint_bytes")), Column("peak memory, GB", gigabytes("peak_bytes")),
    Column(f"{MEMORY_FACTOR} x checkpoint + {MEMORY_PLUS_BYTES / 1e6:.0f} MB, GB", gigabytes("memory_goal_bytes")),
)


def _bars(checkpoint: options.BenchCheckpoint, rows: Sequence[Mapping[str, Any]]) -> report.Bars:
    return report.Bars(f"Loading {checkpoint.label}, {checkpoint.dtype}", "seconds; gigabytes",
                       ["imports, s", "imported to\nready, s", "ready to\nfirst token, s", "peak\nmemory, GB"],
                       {"transformers" if row["who"] == "hf" else row["who"]: [row["import_s"], row["ready_s"], row[
                           "first_token_s"], row["peak_bytes"] / 1e9] for row in rows})
