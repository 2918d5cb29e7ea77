"""What the engine tells about itself, for metrics and status pages."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import time
from collections.abc import Iterator, Sequence

from jax_mla_cp.batch.step_request import StepRequest
from jax_mla_cp.engine.request import Request
from jax_mla_cp.step.results import RunnerOutput

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Prefilled:
    """A request whose prompt, or what of it had to be computed again, was in a step."""

    id: str
    cached: int
    """Tokens that were in the pages before."""
    new: int
    total: int
    """Known tokens, in the end all of them in pages."""


@dataclasses.dataclass(frozen=True)
class StepReport:
    """One step. With several dp groups, numbers are sums over them."""

    seconds: float
    """From the schedule to the last event."""
    host_seconds: float
    """What of it was not spent in the runner: the engine's own work."""
    prefill_tokens: int
    decode_tokens: int
    """Last sampled tokens and drafts."""
    requests: int
    rank_tokens: tuple[int, ...]
    """[cp]: query tokens of each rank."""
    rank_pairs: tuple[int, ...]
    """[cp]: query-key pairs of each rank, the cost of its attention."""
    prompts: tuple[Prefilled, ...]


@dataclasses.dataclass(frozen=True)
class RequestReport:
    """A request that has ended."""

    reason: str
    """"stop", "length", "abort", or the kind of its failure."""
    prompt_tokens: int
    cached_tokens: int
    output_tokens: int
    queue_seconds: float
    """Until it started, or ended without that."""
    prefill_seconds: float
    """From its start to its first token, or its end without one; 0 if it never started."""
    e2e_seconds: float


class Observer:
    """Called on the engine's thread, between steps: it must not block. This one looks at nothing."""

    def step(self, report: StepReport) -> None: ...

    def started(self, queue_seconds: float) -> None: ...

    def first_token(self, seconds_since_arrival: float) -> None: ...

    def token(self, seconds_since_last: float) -> None:
        """Every token but the first; 0 for those that came with the one before, as drafts that hold."""

    def finished(self, report: RequestReport) -> None: ...

    def preempted(self) -> None: ...


class Reports:
    """Keeps the times of requests and tells an observer, whose errors are logged and go no further."""

    def __init__(self, observer: Observer | None):
        self._observer = observer or Observer()

    def started(self, request: Request) -> None:
        """Nothing, if it is one that starts again."""
        if request.started is None:
            request.started = time.monotonic()
            with _log_errors("started"):
                self._observer.started(request.started - request.arrived)

    def token(self, request: Request, now: float) -> None:
        if request.last_token is None:
            request.first_token = now
            with _log_errors("first_token"):
                self._observer.first_token(now - request.arrived)
        else:
            with _log_errors("token"):
                self._observer.token(now - request.last_token)
        request.last_token = now

    def preempted(self, times: int) -> None:
        for _ in range(times):
            with _log_errors("preempted"):
                self._observer.preempted()

    def finished(self, request: Request, reason: str) -> None:
        now = time.monotonic()
        started = now if request.started is None else request.started
        first = now if request.first_token is None else request.first_token
        report = RequestReport(
            reason=reason,
            prompt_tokens=len(request.prompt),
            cached_tokens=request.cached_tokens,
            output_tokens=request.sampled,
            queue_seconds=started - request.arrived,
            prefill_seconds=first - started,
            e2e_seconds=now - request.arrived,
        )
        with _log_errors("finished"):
            self._observer.finished(report)

    def step(self, report: StepReport) -> None:
        with _log_errors("step"):
            self._observer.step(report)


@contextlib.contextmanager
def _log_errors(event: str) -> Iterator[None]:
    """Logs what an observer raises, and goes on: a broken observer must not stop the engine."""
    try:
        yield
    except Exception:
        log.exception("the engine's observer failed in %s", event)


def describe(step: Sequence[Sequence[tuple[Request, StepRequest]]], output: RunnerOutput) -> StepReport:
    """Describes a step that has run, before its results are applied to its requests; `Engine` adds the times.

    Args:
      step: per dp group, the requests in the step and their parts of it.
    """
    prompts, prefill, total = [], 0, 0
    for request, part in (pair for group in step for pair in group):
        total += len(part.tokens)
        if not request.decoding:
            prompts.append(Prefilled(request.id, part.cached, len(part.tokens), len(request.tokens)))
            prefill += len(part.tokens)
    return StepReport(
        seconds=0.0,
        host_seconds=0.0,
        prefill_tokens=prefill,
        decode_tokens=total - prefill,
        requests=sum(map(len, step)),
        rank_tokens=tuple(output.rank_tokens.tolist()),
        rank_pairs=tuple(output.rank_pairs.tolist()),
        prompts=tuple(prompts),
    )
