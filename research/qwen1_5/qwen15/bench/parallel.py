"""Several workers of one machine: memory and load time of each, tokens per second, time spent in sums over them."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
from typing import Any, Dict, List, Mapping, Sequence

from .. import naming
from ..command_line import Parser, positive
from ..config.flags import boolean
from ..errors import EXIT_FAILED, UserError
from . import child, options, report
from .parallel_rank import PROFILED_TOKENS
from .report import Column, Measured, gigabytes, number, text


def parser() -> Parser:
    """The flags."""
    made = Parser("qwen15 bench parallel", __doc__ or "", ["qwen15 bench parallel --workers 1 2"])
    made.add_argument("--workers", type=positive, nargs="+", default=[1, 2, 4], metavar="N",
                      help="how many (default 1 2 4)")
    made.add_argument("--prompt", type=positive, default=512, metavar="N",
                      help="tokens of the prompt (default 512)")
    made.add_argument("--new_tokens", type=options.at_least_two, default=64, metavar="N",
                      help="tokens after it (default 64)")
    made.add_argument("--vocab_emb_dp", type=boolean, default=True, metavar="True|False",
                      help="False splits embedding and head over the workers too (default True)")
    options.add_checkpoint(made)
    options.add_run(made, "parallel", rounds=3, threads=False, against=())
    return made


def run(args: argparse.Namespace) -> Measured:
    """Measure every number of workers, each started by the launcher as a user starts it.

    Raises:
        UserError: arguments that cannot be, a model that so many workers cannot share, or a run that failed.
    """
    checkpoint = options.find_checkpoint(args)
    dims = checkpoint.config().model.dims
    for workers in args.workers:
        wrong = naming.indivisible(dims, workers)
        if wrong:
            raise UserError(f"{workers} workers cannot share this model: {wrong}", where="--workers")
    rows = [_row(workers, _run(workers, checkpoint, args)) for workers in args.workers]
    for row in rows:
        row["times_first"] = row["decode_tokens_per_s"] / rows[0]["decode_tokens_per_s"]
    facts = {"model": checkpoint.label, "dtype": checkpoint.dtype, "prompt": f"prompt {args.prompt}",
             "new_tokens": f"answer {args.new_tokens}", "rounds": args.rounds}
    return Measured(facts, COLUMNS, rows, _bars(checkpoint, rows))


def _run(workers: int, checkpoint: options.BenchCheckpoint, args: argparse.Namespace) -> List[Dict[str, Any]]:
    """Results of the ranks of one launch."""
    print(f"{workers} worker{'s' * (workers > 1)} ...", file=sys.stderr, flush=True)
    with tempfile.TemporaryDirectory(prefix="qwen15_bench_") as folder:
        job = {"workers": workers, "checkpoint": os.path.abspath(checkpoint.path), "dtype": checkpoint.dtype,
               "prompt": args.prompt, "new_tokens": args.new_tokens, "rounds": args.rounds,
               "vocab_emb_dp": args.vocab_emb_dp, "folder": folder}
        path = os.path.join(folder, "job.json")
        with open(path, "w", encoding="utf-8") as file:
            json.dump(job, file)
        command = shlex.join(["python", "-m", "qwen15.bench.parallel_rank", path])
        done = subprocess.run([sys.executable, "-m", "qwen15.launch", command, str(workers)], cwd=folder,
                              env=child.environment(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
                              universal_newlines=True)
        if done.returncode:
            sys.stderr.write(done.stderr)
            raise UserError(f"failed with exit code {done.returncode}, see above",
                            where=f"the run of {workers} workers", exit_code=EXIT_FAILED)
        results = []
        for rank in range(workers):
            with open(os.path.join(folder, f"rank_{rank}.json"), encoding="utf-8") as file:
                results.append(json.load(file))
        return results


def _row(workers: int, ranks: Sequence[Mapping[str, Any]]) -> Dict[str, Any]:
    """Medians of rank 0's times (ranks run in step), the greatest memory of a rank, AllReduce averaged over all."""
    prefill_s, decode_s = statistics.median(ranks[0]["prefill_s"]), statistics.median(ranks[0]["decode_s"])
    row: Dict[str, Any] = {
        "workers": workers, "threads": ranks[0]["threads"], "join_s": max(rank["join_s"] for rank in ranks),
        "load_s": max(rank["load_s"] for rank in ranks),
        "peak_rss_bytes": max(rank["peak_rss_bytes"] for rank in ranks),
        "pss_bytes": max(rank["pss_bytes"] for rank in ranks),
        "all_pss_bytes": sum(rank["pss_bytes"] for rank in ranks),
        "prefill_s": prefill_s, "decode_s": decode_s, "decode_tokens_per_s": 1 / decode_s}
    if workers > 1:
        row.update({key: statistics.mean(rank[key] for rank in ranks) for key in (
            "profiled_prefill_s", "allreduce_prefill_s", "allreduces_a_prefill", "profiled_decode_s",
            "allreduce_decode_s",
            "allreduces_a_token")})
        row["of_decode"] = row["allreduce_decode_s"] / row["profiled_decode_s"]
        row["of_prefill"] = row["allreduce_prefill_s"] / row["profiled_prefill_s"]
        row["profiled_tokens"] = PROFILED_TOKENS
    return {**row, "ranks": list(ranks)}


def _percent(key: str) -> Any:
    return lambda row: f"{row[key]:.0%}" if key in row else "-"


COLUMNS = (
    Column("workers", text("workers")), Column("threads of each", text("threads")),
    Column("joined, s", number("join_s", ".1f")),
    Column("loaded, s", number("load_s", ".1f")), Column("peak RSS of a rank, GB", gigabytes("peak_rss_bytes")),
    Column("PSS of a rank, GB", gigabytes("pss_bytes")), Column("PSS of all, GB", gigabytes("all_pss_bytes")),
    Column("first token, s", number("prefill_s", ".2f")), Column("tokens/s", number("decode_tokens_per_s")),
    Column("times the first row", number("times_first", ".2f")),
    Column("sums a token, ms", lambda row: f"{row['allreduce_decode_s'] * 1e3:.1f}" if "allreduce_decode_s" in row
           else "-"),
    Column("of the token", _percent("of_decode")), Column("of the prompt", _percent("of_prefill")),
)


def _bars(checkpoint: options.BenchCheckpoint, rows: Sequence[Mapping[str, Any]]) -> report.Bars:
    return report.Bars(f"Workers on one machine, {checkpoint.label}, {checkpoint.dtype}",
                       "tokens per second; gigabytes",
                       [f"{row['workers']} worker{'s' * (row['workers'] > 1)}" for row in rows],
                       {"tokens/s": [row["decode_tokens_per_s"] for row in rows],
                        "PSS of a rank, GB": [row["pss_bytes"] / 1e9 for row in rows],
                        "PSS of all, GB": [row["all_pss_bytes"] / 1e9 for row in rows]})
