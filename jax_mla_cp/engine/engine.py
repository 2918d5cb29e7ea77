"""The engine's thread: schedule, step, process the output. docs/engine.md describes its behavior."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import math
import threading
import time
from collections.abc import Callable, Iterator, Sequence

from jax_mla_cp.batch.step_request import StepRequest
from jax_mla_cp.engine.deadlines import Deadlines
from jax_mla_cp.engine.group_scheduler import DispatchedRequest, ScheduledRequest
from jax_mla_cp.engine.observer import Observer, Reporter, describe
from jax_mla_cp.engine.output_processor import process_output
from jax_mla_cp.engine.request import Failed, FailedKind, Finished, GrammarError, Request, Token
from jax_mla_cp.engine.scheduler import Scheduler
from jax_mla_cp.engine.status import EngineStatus, SpeculationStats
from jax_mla_cp.engine.step_in_flight import StepInFlight
from jax_mla_cp.engine.step_runner import StepRunner
from jax_mla_cp.step.errors import RunnerFailed
from jax_mla_cp.step.results import RunnerOutput, StepResult

log = logging.getLogger(__name__)

_MAX_FAILURES_IN_A_ROW = 3
_ABANDON_SECONDS = 1.0
"""Time for the loop to end by itself when it is abandoned."""


class EngineDead(RuntimeError):
    """The engine has stopped or is stopping: it takes no more requests."""


class QueueFull(RuntimeError):
    """The waiting queue is full; try again later."""


class Engine:
    """Runs requests on a model. All methods may be called from any thread.

    Args:
      max_queued: limit of waiting requests, beside those that can run; None: no limit.
      observer: receives reports of steps, requests and tokens.
      watchdog_seconds: a step that takes longer makes the engine unhealthy until it ends; None: no limit.
      overlap: dispatch a step before the one before it is read, where the runner can and no request keeps it from doing so.
    """

    def __init__(
        self,
        runner: StepRunner,
        *,
        max_queued: int | None = None,
        observer: Observer | None = None,
        watchdog_seconds: float | None = None,
        overlap: bool = True,
    ):
        self._runner = runner
        self._scheduler = Scheduler(
            groups=runner.dp,
            pages_per_group=runner.pages_per_group,
            page_size=runner.page_size,
            max_running=runner.max_running,
            prefill_chunk=runner.prefill_chunk,
            draft_tokens=runner.draft_tokens,
        )
        self._reporter = Reporter(observer)
        self._max_requests = math.inf if max_queued is None else max_queued + runner.dp * runner.max_running
        self._watchdog = watchdog_seconds
        self._lock = threading.Condition()
        self._submitted: list[Request] = []
        self._aborted: list[Request] = []
        self._num_unfinished = 0
        self._rejecting: str | None = None
        """The reason why new requests are rejected."""
        self._stopping = False
        self._all_failed = False
        self._dead: str | None = None
        """The reason why the engine has died."""
        self._failures = 0
        """Failed steps in a row."""
        self._deadlines = Deadlines()
        self._overlap = overlap and runner.runs_ahead
        self._in_flight: StepInFlight | None = None
        """The step that was dispatched last, until it is read."""
        self._running_since: float | None = None
        """When the oldest step in flight began, as far as the host can tell."""
        self._runner_seconds = 0.0
        """Time in the runner since the last report."""
        self._last_report = 0.0
        self._steps = 0
        self._speculation = SpeculationStats() if runner.draft_tokens else None
        self.on_death: Callable[[str], None] = lambda reason: None
        """Called on the engine's thread, with the reason, when the engine has died."""
        self._thread = threading.Thread(target=self._loop, name="engine", daemon=True)

    @property
    def unhealthy_reason(self) -> str | None:
        """The reason why requests can't be expected to finish; None if the engine is healthy."""
        if self._dead:
            return self._dead
        if not self._thread.is_alive():
            return "the engine is not running."
        began = self._running_since
        if self._watchdog is not None and began is not None and (took := time.monotonic() - began) > self._watchdog:
            return f"a step has been running for {took:.0f} s; --watchdog is {self._watchdog:g}."
        return None

    def status(self) -> EngineStatus:
        """A snapshot. While a step is in progress, some of its numbers may already be included."""
        groups, stats = self._scheduler.groups, self._scheduler.stats
        return EngineStatus(
            waiting=len(self._submitted) + len(self._scheduler.waiting),
            running=sum(len(group.running) for group in groups),
            pages_total=sum(group.page_pool.num_pages for group in groups),
            pages_free=sum(group.page_pool.num_free for group in groups),
            pages_cached=sum(group.page_pool.num_cached for group in groups),
            prefix_queries=stats.prefix_queries,
            prefix_hits=stats.prefix_hits,
            preemptions=stats.preemptions,
            steps=self._steps,
            speculation=self._speculation,
            compiling=self._runner.compiling,
        )

    def start(self) -> None:
        self._thread.start()

    def submit(self, request: Request) -> None:
        """Queues a request. Its events are sent to `request.emit`.

        Raises:
          EngineDead, QueueFull, ValueError: as `submit_all`.
        """
        self.submit_all([request])

    def submit_all(self, requests: Sequence[Request]) -> None:
        """Queues all of the requests, or none of them.

        Raises:
          EngineDead: the engine has stopped or is stopping.
          QueueFull: the queue has no room for all of them.
          ValueError: a request needs more slots than the cache has, or the queue could never hold all of them.
        """
        if len(requests) > self._max_requests:
            raise ValueError(
                f"n: {len(requests)} choices at once, the limit of running and waiting requests is {self._max_requests}."
            )
        slots = self._runner.pages_per_group * self._runner.page_size
        for request in requests:
            if request.max_slots > slots:
                raise ValueError(
                    f"max_tokens: prompt and output need {request.max_slots} cache slots, the cache has {slots}."
                )
        with self._lock:
            if self._dead or self._rejecting:
                raise EngineDead(self._dead or self._rejecting)
            if self._num_unfinished + len(requests) > self._max_requests:
                raise QueueFull(
                    f"{self._num_unfinished} requests are running or waiting, the limit is {self._max_requests}. "
                    "Try again later."
                )
            now = time.monotonic()
            for request in requests:
                request.submit_time = now
                if math.isnan(request.arrival_time):
                    request.arrival_time = now
            self._num_unfinished += len(requests)
            self._submitted.extend(requests)
            self._lock.notify_all()

    def abort(self, request: Request) -> None:
        """Drops a request in any state. Takes effect before the next step; after that, no more events are sent."""
        with self._lock:
            self._aborted.append(request)
            self._lock.notify_all()

    def drain(self, timeout: float | None = None) -> bool:
        """Rejects new requests and waits for the others to end. The engine runs on: `stop` must still be called.

        Returns:
          True if all requests ended within `timeout` seconds.
        """
        with self._lock:
            self._rejecting = "the server is stopping."
            return self._lock.wait_for(lambda: not self._num_unfinished, timeout)

    def stop(self, timeout: float | None = None) -> None:
        """Ends the loop after the step in progress. Unfinished requests fail."""
        with self._lock:
            self._rejecting, self._stopping = "the server is stopping.", True
            self._lock.notify_all()
        if self._thread.is_alive():
            self._thread.join(timeout)

    def abandon(self, reason: str) -> None:
        """Gives up at once: all requests fail with the reason, even if the step in progress never ends. For a process that is
        about to exit."""
        with self._lock:
            self._dead, self._stopping = self._dead or reason, True
            self._lock.notify_all()
        if self._thread.is_alive():
            self._thread.join(_ABANDON_SECONDS)
        if self._thread.is_alive():
            self._fail_all()

    def _loop(self) -> None:
        try:
            while self._receive():
                self._expire()
                if self._scheduler.has_requests or self._in_flight is not None:
                    self._step()
            if self._in_flight is not None and not self._dead:
                self._read(self._in_flight)
        except BaseException as error:
            log.exception("the engine loop failed")
            self._dead = f"the engine loop failed ({type(error).__name__})."
        finally:
            if self._dead:
                self.on_death(self._dead)
            self._fail_all()
            if self._speculation:
                log.info("speculation: %s", self._speculation)

    def _receive(self) -> bool:
        """Waits for requests, then takes in submitted and aborted ones. Returns False when the loop must end."""
        with self._lock:
            while not (
                self._submitted
                or self._aborted
                or self._stopping
                or self._scheduler.has_requests
                or self._in_flight is not None
            ):
                self._lock.wait()
            for request in self._submitted:
                self._scheduler.add(request)
                self._deadlines.add(request)
            aborted = self._aborted
            self._submitted, self._aborted = [], []
        for request in aborted:
            self._end(request, "abort")
        return not (self._stopping or self._dead)

    def _expire(self) -> None:
        for request, kind, message in self._deadlines.expired(self._scheduler.requests):
            self._fail(request, message, kind)

    def _step(self) -> None:
        """Dispatches the next step, then reads the one before it, which the devices have run meanwhile. Where the next step needs
        what the one before gives, it is read first."""
        before = self._in_flight
        if before is not None and not before.may_be_overtaken:
            self._read(before)
            before = None
            if self._dead:
                return
        if not self._dispatch(overlapped=before is not None):
            return
        if before is not None:
            self._read(before)
        elif self._in_flight is not None and not self._overlap:
            self._read(self._in_flight)

    def _dispatch(self, *, overlapped: bool) -> bool:
        """Schedules and dispatches the next step, if there is anything to run. Returns False if the dispatch has failed."""
        began, preemptions = time.monotonic(), self._scheduler.stats.preemptions
        scheduled_groups = self._scheduler.schedule()
        if not (any(scheduled_groups) or overlapped or not self._scheduler.has_requests):
            raise RuntimeError("requests are waiting, but none can run")
        self._reporter.preempted(self._scheduler.stats.preemptions - preemptions)
        step = [self._step_requests(group) for group in scheduled_groups]
        if not any(step):
            self._in_flight = None
            return True
        for scheduled, _ in (part for group in step for part in group):
            self._reporter.started(scheduled.request)
        report = dataclasses.replace(describe(step), overlapped=overlapped)
        try:
            with self._running():
                pending = self._runner.dispatch([[step_request for _, step_request in group] for group in step])
        except Exception as error:
            self._dispatch_failed(step, error)
            return False
        self._in_flight = StepInFlight(
            pending, [[scheduled.dispatched() for scheduled, _ in group] for group in step], report, began
        )
        return True

    def _dispatch_failed(
        self, step: Sequence[Sequence[tuple[ScheduledRequest, StepRequest]]], error: Exception
    ) -> None:
        if self._in_flight is None:
            self._running_since = None
        if isinstance(error, RunnerFailed):
            self._dead = self._dead or str(error)
            return
        log.error("a step failed", exc_info=error)
        # The runner rejects invalid requests before it runs any: the others have lost nothing.
        invalid = self._invalid_requests(step) if isinstance(error, ValueError) else []
        for request in invalid:
            self._fail(request, "The request's next step is invalid and can't be run.", "internal")
        if not invalid:
            self._recover([scheduled.request for group in step for scheduled, _ in group])

    def _read(self, step: StepInFlight) -> None:
        """Waits for the oldest step in flight and applies its results."""
        try:
            with self._running():
                output = step.pending.result()
        except RunnerFailed as error:
            self._dead = self._dead or str(error)
            return
        except Exception:
            log.exception("a step failed")
            self._recover(step.requests)
            return
        ended = time.monotonic()
        if self._in_flight is step:
            self._in_flight = None
        self._running_since = None if self._in_flight is None else ended
        if self._dead:  # abandoned, and all requests have failed
            return
        self._failures = 0
        for group, results in zip(step.groups, output.results, strict=True):
            for dispatched, result in zip(group, results, strict=True):
                if not dispatched.request.ended:
                    self._update(dispatched, result, ended)
        self._steps += 1
        self._report(step, output)

    def _report(self, step: StepInFlight, output: RunnerOutput) -> None:
        now = time.monotonic()
        seconds = now - max(step.began, self._last_report)
        report = dataclasses.replace(
            step.report,
            seconds=seconds,
            host_seconds=max(seconds - self._runner_seconds, 0.0),
            rank_tokens=tuple(output.rank_tokens.tolist()),
            rank_pairs=tuple(output.rank_pairs.tolist()),
        )
        self._last_report, self._runner_seconds = now, 0.0
        self._reporter.step(report)

    @contextlib.contextmanager
    def _running(self) -> Iterator[None]:
        """Around the runner's work: counts its time, and starts the watchdog's unless a step is in flight already."""
        began = time.monotonic()
        if self._running_since is None:
            self._running_since = began
        try:
            yield
        finally:
            self._runner_seconds += time.monotonic() - began

    def _step_requests(self, group: Sequence[ScheduledRequest]) -> list[tuple[ScheduledRequest, StepRequest]]:
        """The runner's input. A request whose grammar fails is dropped; the others are not affected."""
        step_requests = []
        for scheduled in group:
            try:
                step_requests.append((scheduled, scheduled.step_request()))
            except GrammarError as error:
                self._fail(scheduled.request, str(error), "grammar")
            except Exception:
                log.exception("a request's next token could not be prepared")
                self._fail(scheduled.request, "The request's next token could not be prepared.", "internal")
        return step_requests

    def _invalid_requests(self, step: Sequence[Sequence[tuple[ScheduledRequest, StepRequest]]]) -> list[Request]:
        """The requests of a rejected step that can't be run, each checked alone."""
        invalid = []
        for scheduled, step_request in (part for group in step for part in group):
            try:
                self._runner.check(step_request)
            except ValueError:
                invalid.append(scheduled.request)
        return invalid

    def _update(self, dispatched: DispatchedRequest, result: StepResult, now: float) -> None:
        """Applies a result and sends its events. A request whose text or owner fails doesn't affect the others."""
        request = dispatched.request
        if self._speculation and result.sampled:
            self._speculation = SpeculationStats(
                self._speculation.num_drafts + len(request.drafts),
                self._speculation.num_accepted + len(result.sampled) - 1,
            )
        try:
            events = process_output(dispatched, result)
            self._scheduler.commit_pages(request)
            last = events[-1] if events else None
            for event in events:
                if isinstance(event, Token):
                    self._reporter.token(request, now)
            if isinstance(last, Finished):  # before the event is sent: its receiver may look at the pages
                self._end(request, last.reason)
            for event in events:
                request.emit(event)
        except GrammarError as error:
            self._fail(request, str(error), "grammar")
        except Exception:
            log.exception("a request's output could not be processed")
            self._fail(request, "The request's output could not be processed.", "internal")

    def _recover(self, failed: Sequence[Request]) -> None:
        """Recovers from a failed step, and from those dispatched after or read after it. Their requests fail. The donated cache may
        be gone: all others are computed again."""
        in_flight, self._in_flight, self._running_since = self._in_flight, None, None
        lost = [*failed, *(() if in_flight is None else in_flight.requests)]
        for request in dict.fromkeys(lost):
            if not request.ended:
                self._fail(request, "The step that this request was part of failed.", "step")
        self._scheduler.reset_cache()
        self._failures += 1
        try:
            self._runner.reset()
        except Exception:
            log.exception("the KV cache could not be allocated again")
            self._dead = "a step failed, and the KV cache could not be allocated again."
        if self._failures >= _MAX_FAILURES_IN_A_ROW:
            self._dead = f"{self._failures} steps failed in a row."
        if self._dead:
            log.error("the engine stops: %s", self._dead)

    def _fail_all(self) -> None:
        with self._lock:
            self._stopping = True
            if self._all_failed:  # on another thread: this one was abandoned
                return
            self._all_failed = True
            for request in self._submitted:
                self._scheduler.add(request)
            self._submitted = []
        for request in list(self._scheduler.requests):
            if self._dead:
                lost: FailedKind = "dead" if request.start_time is None else "step"
                self._fail(request, f"The engine has stopped: {self._dead}", lost)
            else:
                self._fail(request, "The server is stopping.", "stopping")

    def _fail(self, request: Request, message: str, kind: FailedKind) -> None:
        self._end(request, kind)
        try:
            request.emit(Failed(message, kind))
        except Exception:  # an owner that fails must not keep the others from being notified
            log.exception("a request's owner could not be notified of its failure")

    def _end(self, request: Request, reason: str) -> None:
        """Removes a request and releases its pages. Does nothing if it has ended already."""
        if self._scheduler.remove(request):
            request.ended = True
            request.drop_pending_tokens()
            with self._lock:
                self._num_unfinished -= 1
                self._lock.notify_all()
            self._reporter.finished(request, reason)
