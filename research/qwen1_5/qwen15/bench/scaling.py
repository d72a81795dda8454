"""How decoding and prefill grow with the number of threads, beside what the machine allows so many."""

from __future__ import annotations

import argparse
from typing import Any, Callable, Dict, List, Mapping, NamedTuple, Sequence, Tuple

from .. import ops
from ..command_line import Parser, positive, whole_from
from ..kernels import library
from ..machine import MOST_THREADS
from . import options, report, rounds, work
from .ours import Decode, Ours, random_prompts
from .probes import Probes
from .report import Column, Measured, number, text


def parser() -> Parser:
    """The flags."""
    made = Parser("qwen15 bench scaling", __doc__ or "", ["qwen15 bench scaling --threads 1 2 4 8"])
    made.add_argument("--threads", type=whole_from(1, MOST_THREADS), nargs="+", metavar="N",
                      help="how many (default 1, 2, 4, ... up to what a run takes here)")
    made.add_argument("--batch", type=positive, nargs="+", default=[1, 8, 32], metavar="B",
                      help="sequences that decode at once (default 1 8 32)")
    made.add_argument("--prefill", type=positive, default=512, metavar="N",
                      help="tokens of the prompt (default 512)")
    options.add_lengths(made, 32, prompt="tokens in the cache when decoding begins")
    options.add_checkpoint(made)
    options.add_run(made, "scaling", rounds=3, threads=False, against=())
    return made


def run(args: argparse.Namespace) -> Measured:
    """Measure decoding at each batch size, and a prompt, on each number of threads; the numbers take turns.

    Raises:
        UserError: arguments that cannot be.
    """
    checkpoint = options.find_checkpoint(args)
    machine = Probes()
    counts = sorted(set(args.threads or powers(machine.threads)))
    longest = max(args.context + args.new_tokens, args.prefill + 1)
    ours = Ours(checkpoint, max(counts), longest, max(args.batch))
    prompt = random_prompts(1, args.prefill, ours.vocab_size)[0].tolist()
    jobs = []
    middle = args.context + args.new_tokens / 2  # tokens in the cache, on average
    for batch in args.batch:
        decode = Decode(ours, random_prompts(batch, args.context, ours.vocab_size), args.new_tokens)
        jobs.append(Job(f"decode, batch {batch}", batch, decode.run,
                        work.decode_bytes(ours.dims, checkpoint.dtype, batch, middle, ours.quantised_bytes),
                        work.decode_flop(ours.dims, batch, middle)))
    jobs.append(Job(f"prefill, {args.prefill} tokens", args.prefill, lambda: ours.prefill(prompt),
                    work.decode_bytes(ours.dims, checkpoint.dtype, 1, args.prefill, ours.quantised_bytes),
                    work.prefill_flop(ours.dims, args.prefill)))
    rows = _rows(jobs, counts, lambda: machine.limits(checkpoint.computes_in), args.rounds)
    facts = {"model": checkpoint.label, "dtype": checkpoint.dtype, "rounds": args.rounds, "kernels": machine.kernels}
    return Measured(facts, COLUMNS, rows, _bars(checkpoint, counts, rows))


def powers(most: int) -> List[int]:
    """1, 2, 4, ... below `most`, and `most`."""
    counts = [1]
    while counts[-1] * 2 < most:
        counts.append(counts[-1] * 2)
    return counts + [most] * (most > 1)


class Job(NamedTuple):
    """Something to measure: its name, the tokens it makes or takes in, a run of it, and what that has to do."""

    what: str
    tokens: int
    run: Callable[[], rounds.Timing]
    read_bytes: float
    flop: float


def _rows(jobs: Sequence[Job], counts: Sequence[int], probe: Callable[[], Mapping[str, float]], count: int
          ) -> List[Dict[str, Any]]:
    """A row for each job and number of threads; the numbers take turns, and each run is between probes on as many."""
    samples: Dict[Tuple[str, int], List[rounds.Sample]] = {(job.what, n): [] for job in jobs for n in counts}
    working: Dict[Tuple[str, int], List[int]] = {key: [] for key in samples}
    for round_ in range(count + 1):
        for threads_ in counts:
            ops.use_threads(threads_)
            before = probe()
            for job in jobs:
                took = job.run()
                working[job.what, threads_].append(library.load().working_threads)
                after = probe()
                if round_:  # the first does not count
                    samples[job.what, threads_].append(rounds.Sample.between(before, took, after))
                before = after
    made = []
    for job in jobs:
        best_s = min(rounds.median_seconds(samples[job.what, n]) for n in counts)
        for threads_ in counts:
            taken = samples[job.what, threads_]
            median_s = rounds.median_seconds(taken)
            made.append({"what": job.what, "threads": threads_, "working_threads": min(working[job.what, threads_][1:]),
                         "ms": median_s * 1e3, "tokens_per_s": job.tokens / median_s, "of_best": best_s / median_s,
                         "own_ms": rounds.median_own_seconds(taken) * 1e3, "read_bytes": job.read_bytes,
                         "flop": job.flop, **rounds.limits(taken, job.read_bytes, job.flop),
                         "samples": rounds.as_json({"qwen15": taken})})
    return made


COLUMNS = (
    Column("", text("what")), Column("threads", text("threads")),
    Column("at work, the fewest", text("working_threads")), Column("ms", number("ms", ".2f")),
    Column("tokens/s", number("tokens_per_s")), Column("of the best", number("of_best", ".2f")),
    Column("of it not kernels, ms", number("own_ms", ".2f")), *report.LIMITS,
)


def _bars(checkpoint: options.BenchCheckpoint, counts: Sequence[int], rows: Sequence[Mapping[str, Any]]) -> report.Bars:
    whats = list(dict.fromkeys(row["what"] for row in rows))
    found = {(row["what"], row["threads"]): row for row in rows}
    ones = {what: found[what, counts[0]]["tokens_per_s"] for what in whats}
    return report.Bars(f"Threads, {checkpoint.label}, {checkpoint.dtype}",
                       f"times {counts[0]} thread{'s' * (counts[0] > 1)}",
                       [what.replace(", ", ",\n") for what in whats],
                       {f"{count} thread{'s' * (count > 1)}":
                        [found[what, count]["tokens_per_s"] / ones[what] for what in whats] for count in counts},
                       {f"what bandwidth and peak allow {counts[-1]}":
                        [found[what, counts[-1]]["tokens_per_s"] / found[what, counts[-1]]["of_both"] / ones[what]
                         for what in whats]})
