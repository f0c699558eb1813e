"""What a server of students counts, as Prometheus reads it (text format 0.0.4); updated in the event loop alone."""

import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
"""Upper bounds of a request's seconds."""


@dataclass
class Outcome:
    """How a request ended. `images`: how many were classified."""

    status: int = 500
    images: int = 0


@dataclass
class Metrics:
    """Requests to /invocations since the server started.

    Attributes:
        model: labels of what is served.
        running: requests being read, waiting or computed.
        requests: number by status.
        seconds: number of requests by the first of `BUCKETS` that is not exceeded.
    """

    model: Mapping[str, str]
    running: int = 0
    images: int = 0
    total_seconds: float = 0.0
    requests: Counter[int] = field(default_factory=Counter)
    seconds: Counter[float] = field(default_factory=Counter)

    @contextmanager
    def request(self) -> Iterator[Outcome]:
        """Count a request whose outcome is filled in within the block."""
        self.running += 1
        began, outcome = time.perf_counter(), Outcome()
        try:
            yield outcome
        finally:
            took = time.perf_counter() - began
            self.running -= 1
            self.images += outcome.images
            self.requests[outcome.status] += 1
            self.total_seconds += took
            self.seconds[next((bound for bound in BUCKETS if took <= bound), float("inf"))] += 1

    def text(self) -> str:
        """All of them, for a scrape."""
        below, cumulated = 0, []
        for bound in BUCKETS:
            below += self.seconds[bound]
            cumulated.append(f'asib_request_seconds_bucket{{le="{bound:g}"}} {below}')
        count = sum(self.requests.values())
        labels = ",".join(f'{name}="{_escaped(value)}"' for name, value in self.model.items())
        lines = [
            *_head("asib_requests_total", "counter", "Requests to /invocations by HTTP status."),
            *(f'asib_requests_total{{status="{status}"}} {n}' for status, n in sorted(self.requests.items())),
            *_head("asib_images_total", "counter", "Images classified."),
            f"asib_images_total {self.images}",
            *_head("asib_requests_running", "gauge", "Requests being read, waiting or computed."),
            f"asib_requests_running {self.running}",
            *_head("asib_request_seconds", "histogram", "Seconds from a request's header to its answer."),
            *cumulated,
            f'asib_request_seconds_bucket{{le="+Inf"}} {count}',
            f"asib_request_seconds_sum {self.total_seconds:.6f}",
            f"asib_request_seconds_count {count}",
            *_head("asib_model_info", "gauge", "What is served."),
            f"asib_model_info{{{labels}}} 1",
        ]
        return "\n".join(lines) + "\n"


def _head(name: str, kind: str, words: str) -> tuple[str, str]:
    return f"# HELP {name} {words}", f"# TYPE {name} {kind}"


def _escaped(value: str) -> str:
    return value.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
