"""Runs that take turns, A B A B ..., each between two probes of the machine; and their medians."""

from __future__ import annotations

import statistics
from typing import Callable, Dict, List, Mapping, NamedTuple, Sequence


class Sample(NamedTuple):
    """One run: its seconds, what the caller noted beside them, and the better of the probes before and after it."""

    seconds: float
    own_seconds: float
    probe: Mapping[str, float]

    @classmethod
    def between(cls, before: Mapping[str, float], took: "Timing", after: Mapping[str, float]) -> "Sample":
        """A run with what was probed just before and just after it."""
        return cls(took.seconds, took.own_seconds, {key: max(before[key], after[key]) for key in after})


class Timing(NamedTuple):
    """Seconds of the thing measured, and those of them that were not the kernels' (0 if unknown)."""

    seconds: float
    own_seconds: float = 0.0


def interleave(contenders: Mapping[str, Callable[[], Timing]], rounds: int, probe: Callable[[], Mapping[str, float]]
               ) -> Dict[str, List[Sample]]:
    """Run every contender once in each round, in the order given, after one round that does not count.

    The machine's speed drifts within minutes; contenders that take turns meet the same drift, and each run is held
    against what was measured just before and just after it: the better of the two, so that no run is flattered.

    Args:
        contenders: name -> one run.
        rounds: how many count.
        probe: what the machine can do now, by name.

    Returns:
        name -> samples, one a round.
    """
    for run in contenders.values():
        run()
    samples: Dict[str, List[Sample]] = {name: [] for name in contenders}
    before = probe()
    for _ in range(rounds):
        for name, run in contenders.items():
            took = run()
            after = probe()
            samples[name].append(Sample.between(before, took, after))
            before = after
    return samples


def median_seconds(samples: Sequence[Sample]) -> float:
    """The median of the runs."""
    return statistics.median(sample.seconds for sample in samples)


def median_own_seconds(samples: Sequence[Sample]) -> float:
    """The median of what was not the kernels'."""
    return statistics.median(sample.own_seconds for sample in samples)


def median_probe(samples: Sequence[Sample], name: str) -> float:
    """The median of a probe beside the runs."""
    return statistics.median(sample.probe[name] for sample in samples)


def fraction(samples: Sequence[Sample], amount: float, name: str) -> float:
    """Median over the runs of (amount / seconds) / probe: 1 is all that the machine had at that moment."""
    return statistics.median(amount / sample.seconds / sample.probe[name] for sample in samples)


def limits(samples: Sequence[Sample], read_bytes: float, flop: float) -> Dict[str, float]:
    """What the machine had beside the runs, and how much of it they used.

    Args:
        samples: runs whose probes are `bandwidth` (bytes/s) and `peak` (operations/s).
        read_bytes, flop: what one run has to read and to compute.

    Returns:
        medians: bandwidth_gb_per_s, peak_gflop_per_s; of_bandwidth and of_peak as `fraction` has them; of_both: the
        seconds that the scarcer of the two would have taken, over those it took.
    """
    both = statistics.median(max(read_bytes / s.probe["bandwidth"], flop / s.probe["peak"]) / s.seconds
                             for s in samples)
    return {"bandwidth_gb_per_s": median_probe(samples, "bandwidth") / 1e9,
            "of_bandwidth": fraction(samples, read_bytes, "bandwidth"),
            "peak_gflop_per_s": median_probe(samples, "peak") / 1e9, "of_peak": fraction(samples, flop, "peak"),
            "of_both": both}


def as_json(samples: Mapping[str, Sequence[Sample]]) -> Dict[str, Dict[str, List[float]]]:
    """The raw numbers behind the medians: seconds of each run, and each probe beside it."""
    made: Dict[str, Dict[str, List[float]]] = {}
    for name, taken in samples.items():
        made[name] = {"seconds": [sample.seconds for sample in taken]}
        for key in taken[0].probe:
            made[name][key] = [sample.probe[key] for sample in taken]
    return made


def ratio(ours: Sequence[Sample], theirs: Sequence[Sample]) -> float:
    """Median over the rounds of their seconds over ours: 2 is twice as fast."""
    return statistics.median(b.seconds / a.seconds for a, b in zip(ours, theirs))


def compared(samples: Mapping[str, Sequence[Sample]], tokens: int) -> Dict[str, float]:
    """Of everyone who took turns with "qwen15": tokens a second, each run having so many, and our times as fast."""
    ours = samples["qwen15"]
    row: Dict[str, float] = {}
    for name, theirs in samples.items():
        if theirs is not ours:
            row[f"{name}_tokens_per_s"] = tokens / median_seconds(theirs)
            row[f"ratio_{name}"] = ratio(ours, theirs)
    return row
