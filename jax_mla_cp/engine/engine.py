"""The engine's thread: schedule, step, process the output. docs/engine.md describes its behavior."""

from __future__ import annotations

import itertools
import logging
import math
import threading
import time
from collections.abc import Callable, Sequence

from jax_mla_cp.engine.deadlines import Deadlines
from jax_mla_cp.engine.observer import Observer, Reporter, describe
from jax_mla_cp.engine.output_processor import process_output
from jax_mla_cp.engine.pipeline import Pipeline, StepInFlight
from jax_mla_cp.engine.request import Failed, FailedKind, Finished, GrammarError, Request, Token
from jax_mla_cp.engine.scheduled_request import PreparedRequest, ScheduledRequest
from jax_mla_cp.engine.scheduler import Scheduler
from jax_mla_cp.engine.status import EngineStatus, SpeculationStats
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
        self._pipeline = Pipeline(runner)
        self._lap = self._clock()
        """The beginning of the time that the next report is about."""
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
        began = self._pipeline.running_since
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
                if self._has_work:
                    self._step()
            self._read_all_but(0)
        except BaseException as error:
            log.exception("the engine loop failed")
            self._dead = f"the engine loop failed ({type(error).__name__})."
        finally:
            if self._dead:
                self.on_death(self._dead)
            self._fail_all()
            if self._speculation:
                log.info("speculation: %s", self._speculation)

    @property
    def _has_work(self) -> bool:
        return self._scheduler.has_requests or bool(self._pipeline)

    def _receive(self) -> bool:
        """Waits for requests, then takes in submitted and aborted ones. Returns False when the loop must end."""
        with self._lock:
            while not (self._submitted or self._aborted or self._stopping or self._has_work):
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
        if self._pipeline.needs_host:
            self._read_all_but(0)
            if self._dead:
                return
        if not self._pipeline:
            self._lap = self._clock()
        is_ahead = self._dispatch() and self._overlap
        self._read_all_but(1 if is_ahead else 0)

    def _dispatch(self) -> bool:
        """Schedules and dispatches the next step. Returns False if there is none, or it can't be dispatched."""
        preemptions = self._scheduler.stats.preemptions
        scheduled_groups = self._scheduler.schedule()
        if not any(scheduled_groups) and not self._pipeline and self._scheduler.has_requests:
            raise RuntimeError("requests are waiting, but none can run")
        self._reporter.preempted(self._scheduler.stats.preemptions - preemptions)
        groups = [self._prepare(group) for group in scheduled_groups]
        if not any(groups):
            return False
        parts = list(itertools.chain(*groups))
        for part in parts:
            self._reporter.started(part.request)
        try:
            self._pipeline.dispatch(groups)
        except RunnerFailed as error:
            self._dead = self._dead or str(error)
            return False
        except Exception as error:
            log.exception("a step failed")
            # The runner rejects invalid requests before it runs any: the others have lost nothing.
            invalid = self._invalid(parts) if isinstance(error, ValueError) else []
            for request in invalid:
                self._fail(request, "The request's next step is invalid and can't be run.", "internal")
            if not invalid:
                self._recover([part.request for part in parts])
            return False
        return True

    def _prepare(self, group: Sequence[ScheduledRequest]) -> list[PreparedRequest]:
        """The runner's input. A request whose grammar fails is dropped; the others are not affected."""
        prepared = []
        for scheduled in group:
            try:
                prepared.append(scheduled.prepare())
            except GrammarError as error:
                self._fail(scheduled.request, str(error), "grammar")
            except Exception:
                log.exception("a request's next token could not be prepared")
                self._fail(scheduled.request, "The request's next token could not be prepared.", "internal")
        return prepared

    def _invalid(self, parts: Sequence[PreparedRequest]) -> list[Request]:
        """The requests of a rejected step that can't be run, each checked alone."""
        invalid = []
        for part in parts:
            try:
                self._runner.check(part.step_request)
            except ValueError:
                invalid.append(part.request)
        return invalid

    def _read_all_but(self, count: int) -> None:
        """Reads steps until `count` are in flight."""
        while len(self._pipeline) > count and not self._dead:
            self._read()

    def _read(self) -> None:
        """Waits for the oldest step in flight and applies its results."""
        try:
            step, output = self._pipeline.read()
        except RunnerFailed as error:
            self._dead = self._dead or str(error)
            return
        except Exception:
            log.exception("a step failed")
            self._recover()
            return
        if self._dead:  # abandoned, and all requests have failed
            return
        now = time.monotonic()
        self._failures = 0
        for group, results in zip(step.groups, output.results, strict=True):
            for part, result in zip(group, results, strict=True):
                if not part.request.ended:
                    self._update(part, result, now)
        self._steps += 1
        self._report(step, output)

    def _report(self, step: StepInFlight, output: RunnerOutput) -> None:
        (began, runner_began), self._lap = self._lap, self._clock()
        now, runner_now = self._lap
        seconds = now - began
        host_seconds = seconds - (runner_now - runner_began)
        self._reporter.step(describe(step, output, seconds=seconds, host_seconds=host_seconds))

    def _clock(self) -> tuple[float, float]:
        return time.monotonic(), self._pipeline.runner_seconds

    def _update(self, part: PreparedRequest, result: StepResult, now: float) -> None:
        """Applies a result and sends its events. A request whose text or owner fails doesn't affect the others."""
        request = part.request
        if self._speculation and result.sampled:
            self._speculation = SpeculationStats(
                self._speculation.num_drafts + len(request.drafts),
                self._speculation.num_accepted + len(result.sampled) - 1,
            )
        try:
            events = process_output(part, result)
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

    def _recover(self, failed: Sequence[Request] = ()) -> None:
        """Recovers from a failed step: its requests fail, and those of all steps in flight. The donated cache may be gone: all others
        are computed again."""
        for request in dict.fromkeys([*failed, *self._pipeline.clear()]):
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
