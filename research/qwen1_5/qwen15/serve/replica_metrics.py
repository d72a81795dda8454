"""What a replica counts, handed to Ray: its metrics agents show it for Prometheus with the replica's name."""

from __future__ import annotations

from typing import Any, Callable, Dict, List, Tuple

from .metrics import SECONDS, TOKEN_SECONDS


class _Counted:
    """A Ray counter as prometheus_client's are called."""

    def __init__(self, counter: Any, tags: Dict[str, str]):
        self._counter, self._tags = counter, tags

    def inc(self, by: float = 1.0) -> None:
        """Add; Ray takes no zero."""
        if by > 0:
            self._counter.inc(by, tags=self._tags)

    def labels(self, *values: str) -> "_Counted":
        """The same for these values of the labels."""
        return _Counted(self._counter, dict(zip(self._tags, values)))


class ReplicaMetrics:
    """As `metrics.Metrics`, on Ray."""

    def __init__(self) -> None:
        from ray.util import metrics

        def counter(name: str, what: str, labels: Tuple[str, ...] = ()) -> _Counted:
            return _Counted(metrics.Counter(f"qwen15_{name}", what, tag_keys=labels), dict.fromkeys(labels, ""))

        def histogram(name: str, what: str, buckets: Tuple[float, ...]) -> Any:
            return metrics.Histogram(f"qwen15_{name}", what, boundaries=list(buckets))

        self.requests = counter("requests", "Requests answered, by endpoint and HTTP status", ("endpoint", "status"))
        self.aborted = counter("aborted_requests", "Requests whose client left before the end")
        self.prompt_tokens = counter("prompt_tokens", "Tokens of prompts, those found in the prefix cache included")
        self.cached_tokens = counter("cached_prompt_tokens", "Tokens of prompts that the prefix cache held")
        self.generated_tokens = counter("generated_tokens", "Tokens generated")
        self.first_token_s = histogram("time_to_first_token_seconds", "From a request's arrival to its first token",
                                       SECONDS)
        self.token_s = histogram("time_per_output_token_seconds", "Between a request's tokens, on average",
                                 TOKEN_SECONDS)
        self.request_s = histogram("request_seconds", "From a request's arrival to its end", SECONDS)
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
