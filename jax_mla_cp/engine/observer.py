"""The engine's observer: reports of steps and requests for metrics and the status page."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import time
from collections.abc import Iterator

from jax_mla_cp.engine.pipeline import StepInFlight
from jax_mla_cp.engine.request import Request
from jax_mla_cp.step.results import RunnerOutput

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class PrefillReport:
    """A request's prefill in one step: a chunk of its prompt, or of what it computes again after preemption."""

    id: str
    cached: int
    """Tokens that were in the pages before the step."""
    new: int
    """Tokens that the step computed."""
    total: int
    """Tokens to prefill in all."""


@dataclasses.dataclass(frozen=True)
class StepReport:
    """One step, summed over the dp groups."""

    seconds: float
    """From scheduling to the last event; with steps in flight, from the last event of the step before."""
    host_seconds: float
    """The part of `seconds` outside the runner: the engine's own work."""
    overlapped: bool
    """True if it was dispatched before the step before it had been read."""
    prefill_tokens: int
    decode_tokens: int
    """Decoding requests' last tokens and drafts."""
    requests: int
    rank_tokens: tuple[int, ...]
    """[cp]: query tokens of each rank."""
    rank_pairs: tuple[int, ...]
    """[cp]: query-key pairs of each rank, the cost of its attention."""
    prefills: tuple[PrefillReport, ...]


@dataclasses.dataclass(frozen=True)
class RequestReport:
    """A request that has ended: finished, failed or aborted."""

    reason: str
    """"stop", "length", "abort", or the kind of failure."""
    prompt_tokens: int
    cached_tokens: int
    output_tokens: int
    queue_seconds: float
    """From arrival to the start, or to the end if it never started."""
    prefill_seconds: float
    """From the start to the first token, or to the end if there was none; 0 if it never started."""
    e2e_seconds: float
    """From arrival to the end."""


class Observer:
    """Base class of observers; it ignores everything. Called on the engine's thread, between steps: it must not block."""

    def step(self, report: StepReport) -> None: ...

    def started(self, queue_seconds: float) -> None: ...

    def first_token(self, seconds_since_arrival: float) -> None: ...

    def token(self, seconds_since_last: float) -> None:
        """Every token but a request's first. Accepted drafts come in one step: 0 between them."""

    def finished(self, report: RequestReport) -> None: ...

    def preempted(self) -> None: ...


class Reporter:
    """Records the times of requests and calls an observer. The observer's errors are logged and go no further."""

    def __init__(self, observer: Observer | None):
        self._observer = observer or Observer()

    def started(self, request: Request) -> None:
        """Reports a request's first start. A preempted request that starts again is ignored."""
        if request.start_time is None:
            request.start_time = time.monotonic()
            with _log_errors("started"):
                self._observer.started(request.start_time - request.submit_time)

    def token(self, request: Request, now: float) -> None:
        if request.last_token_time is None:
            request.first_token_time = now
            with _log_errors("first_token"):
                self._observer.first_token(now - request.arrival_time)
        else:
            with _log_errors("token"):
                self._observer.token(now - request.last_token_time)
        request.last_token_time = now

    def preempted(self, count: int) -> None:
        for _ in range(count):
            with _log_errors("preempted"):
                self._observer.preempted()

    def finished(self, request: Request, reason: str) -> None:
        now = time.monotonic()
        started = now if request.start_time is None else request.start_time
        first = now if request.first_token_time is None else request.first_token_time
        report = RequestReport(
            reason=reason,
            prompt_tokens=len(request.prompt),
            cached_tokens=request.cached_tokens,
            output_tokens=request.num_output_tokens,
            queue_seconds=started - request.submit_time,
            prefill_seconds=first - started,
            e2e_seconds=now - request.arrival_time,
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


def describe(step: StepInFlight, output: RunnerOutput, *, seconds: float, host_seconds: float) -> StepReport:
    """Describes a step that has been read."""
    prefills, prefill_tokens, total = [], 0, 0
    for part in step.parts:
        new = len(part.step_request.tokens)
        total += new
        if part.is_prefill:
            prefills.append(PrefillReport(part.request.id, part.start, new, part.num_tokens))
            prefill_tokens += new
    return StepReport(
        seconds=seconds,
        host_seconds=host_seconds,
        overlapped=step.overlapped,
        prefill_tokens=prefill_tokens,
        decode_tokens=total - prefill_tokens,
        requests=len(step.parts),
        rank_tokens=tuple(output.rank_tokens.tolist()),
        rank_pairs=tuple(output.rank_pairs.tolist()),
        prefills=tuple(prefills),
    )
