"""What a replica counts, handed to Ray: its metrics agents show it for Prometheus with the replica's name."""

from __future__ import annotations

from typing import Any, Callable, Dict, List, Tuple

from .metrics import Counted


class _RayCounter:
    """A Ray counter as prometheus_client's are called."""

    def __init__(self, counter: Any, tags: Dict[str, str]):
        self._counter, self._tags = counter, tags

    def inc(self, by: float = 1.0) -> None:
        """Add; Ray takes no zero."""
        if by > 0:
            self._counter.inc(by, tags=self._tags)

    def labels(self, *values: str) -> "_RayCounter":
        """The same for these values of the labels."""
        return _RayCounter(self._counter, dict(zip(self._tags, values)))


class ReplicaMetrics(Counted):
    """As `metrics.Metrics`, on Ray."""

    def __init__(self) -> None:
        from ray.util import metrics

        super().__init__(
            lambda name, what, labels=(): _RayCounter(metrics.Counter(name, what, tag_keys=labels),
                                                      dict.fromkeys(labels, "")),
            lambda name, what, buckets: metrics.Histogram(name, what, boundaries=list(buckets)))
        self._gauge = metrics.Gauge
        self._watched: List[Tuple[Any, Callable[[], float]]] = []

    def watch(self, name: str, what: str, read: Callable[[], float]) -> None:
        """A gauge that `refresh` reads."""
        self._watched.append((self._gauge(f"qwen15_{name}", what), read))

    def refresh(self) -> None:
        """Give Ray the gauges' values of now."""
        for gauge, read in self._watched:
            gauge.set(float(read()))

    def text(self) -> Tuple[bytes, str]:
        """Ray shows them itself."""
        return b"", "text/plain"
