"""What the server counts, as Prometheus reads it."""

from __future__ import annotations

from typing import Any, Callable, Tuple

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
_TOKEN_SECONDS = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2)


class Counted:
    """Counters and histograms of one server.

    Args:
        counter: makes one of a name, what it counts, and the names of its labels if it has any.
        histogram: makes one of a name, what it is about, and the upper ends of its buckets.
    """

    def __init__(self, counter: Callable[..., Any], histogram: Callable[..., Any]) -> None:
        self.requests = counter("qwen15_requests", "Requests answered, by endpoint and HTTP status",
                                ("endpoint", "status"))
        self.aborted = counter("qwen15_aborted_requests", "Requests whose client left before the end")
        self.prompt_tokens = counter("qwen15_prompt_tokens",
                                     "Tokens of prompts, those found in the prefix cache included")
        self.cached_tokens = counter("qwen15_cached_prompt_tokens", "Tokens of prompts that the prefix cache held")
        self.generated_tokens = counter("qwen15_generated_tokens", "Tokens generated")
        self.first_token_s = histogram("qwen15_time_to_first_token_seconds",
                                       "From a request's arrival to its first token", _SECONDS)
        self.token_s = histogram("qwen15_time_per_output_token_seconds", "Between a request's tokens, on average",
                                 _TOKEN_SECONDS)
        self.request_s = histogram("qwen15_request_seconds", "From a request's arrival to its end", _SECONDS)


class Metrics(Counted):
    """What is counted in a registry of its own, and gauges that are read when somebody asks."""

    def __init__(self) -> None:
        self._registry = registry = CollectorRegistry()
        super().__init__(
            lambda name, what, labels=(): Counter(name, what, labels, registry=registry),
            lambda name, what, buckets: Histogram(name, what, registry=registry, buckets=buckets))

    def watch(self, name: str, what: str, read: Callable[[], float]) -> None:
        """A gauge that is read when somebody asks."""
        Gauge(f"qwen15_{name}", what, registry=self._registry).set_function(read)

    def text(self) -> Tuple[bytes, str]:
        """The page for Prometheus, and its content type."""
        return generate_latest(self._registry), CONTENT_TYPE_LATEST
