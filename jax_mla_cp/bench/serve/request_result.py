"""`RequestResult`: one request of a load test, its times and its tokens."""

from __future__ import annotations

import dataclasses
import itertools

from jax_mla_cp.bench.serve.workload import PlannedRequest


@dataclasses.dataclass
class RequestResult:
    """A request's progress and outcome. Times are seconds after the run's start, on the client's monotonic clock."""

    planned: PlannedRequest
    sent: float | None = None
    """When it was sent; None: not yet."""
    chunks: list[float] = dataclasses.field(default_factory=list)
    """When each chunk with a token arrived."""
    end: float | None = None
    """When the answer was complete, or had failed."""
    prompt_tokens: int | None = None
    """As the server counts them; None: it doesn't say."""
    cached_tokens: int = 0
    output_tokens: int = 0
    """As the server counts them, else the number of chunks."""
    finish_reason: str | None = None
    error: str | None = None
    """The kind of failure (`RequestError.kind`)."""
    message: str = ""
    """The failure's message."""

    @property
    def ok(self) -> bool:
        return self.end is not None and self.error is None

    @property
    def late(self) -> float:
        """Seconds from the planned time to sending."""
        return self._since_planned(self.sent)

    @property
    def ttft(self) -> float:
        """Time to first token, in seconds from the planned time."""
        return self._since_planned(self.chunks[0])

    @property
    def e2e(self) -> float:
        """End-to-end latency, in seconds from the planned time."""
        return self._since_planned(self.end)

    @property
    def itl(self) -> list[float]:
        """Inter-token latencies, in seconds: one per chunk after the first."""
        return [b - a for a, b in itertools.pairwise(self.chunks)]

    @property
    def tpot(self) -> float | None:
        """Mean time per output token after the first, in seconds; None for a single token."""
        return (self.chunks[-1] - self.chunks[0]) / (self.output_tokens - 1) if self.output_tokens > 1 else None

    def _since_planned(self, moment: float | None) -> float:
        assert moment is not None
        return moment - self.planned.at
