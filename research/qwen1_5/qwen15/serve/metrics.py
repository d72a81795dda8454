"""What the server counts, as Prometheus reads it."""

from __future__ import annotations

from typing import Callable, Tuple

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
TOKEN_SECONDS = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2)


class Metrics:
    """Counters, gauges and histograms of one server; `gauges` are read when somebody asks."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()

        def made(kind, name: str, what: str, labels: Tuple[str, ...] = (), **options):
            return kind(f"qwen15_{name}", what, labels, registry=self._registry, **options)

        self.requests = made(Counter, "requests", "Requests answered, by endpoint and HTTP status",
                             ("endpoint", "status"))
        self.aborted = made(Counter, "aborted_requests", "Requests whose client left before the end")
        self.prompt_tokens = made(Counter, "prompt_tokens",
                                  "Tokens of prompts, those found in the prefix cache included")
        self.cached_tokens = made(Counter, "cached_prompt_tokens", "Tokens of prompts that the prefix cache held")
        self.generated_tokens = made(Counter, "generated_tokens", "Tokens generated")
        self.first_token_s = made(Histogram, "time_to_first_token_seconds",
                                  "From a request's arrival to its first token", buckets=SECONDS)
        self.token_s = made(Histogram, "time_per_output_token_seconds", "Between a request's tokens, on average",
                            buckets=TOKEN_SECONDS)
        self.request_s = made(Histogram, "request_seconds", "From a request's arrival to its end", buckets=SECONDS)
        self._gauge = made

    def watch(self, name: str, what: str, read: Callable[[], float]) -> None:
        """A gauge that is read when somebody asks."""
        self._gauge(Gauge, name, what).set_function(read)

    def text(self) -> Tuple[bytes, str]:
        """The page for Prometheus, and its content type."""
        return generate_latest(self._registry), CONTENT_TYPE_LATEST
