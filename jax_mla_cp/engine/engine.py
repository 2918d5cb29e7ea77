"""The loop: schedule, step, hand out the tokens, on a thread of its own. docs/engine.md tells how it behaves."""

from __future__ import annotations

import dataclasses
import logging
import math
import threading
import time
from collections.abc import Sequence

from jax_mla_cp.batch.step_request import StepRequest
from jax_mla_cp.engine.deadlines import Deadlines
from jax_mla_cp.engine.group import Scheduled
from jax_mla_cp.engine.observer import Observer, Reports, StepReport, describe
from jax_mla_cp.engine.output import take
from jax_mla_cp.engine.request import Failed, FailedKind, Finished, GrammarError, Request, Token
from jax_mla_cp.engine.scheduler import Scheduler
from jax_mla_cp.engine.status import EngineStatus, Speculation
from jax_mla_cp.engine.steps import Steps
from jax_mla_cp.step.results import StepResult

log = logging.getLogger(__name__)

_FAILURES_IN_A_ROW = 3


class EngineDead(RuntimeError):
    """The engine has stopped, or is about to, and takes no more requests."""


class QueueFull(RuntimeError):
    """As many requests wait as may; try again later."""


class Engine:
    """Runs requests on a model. All methods may be called from any thread.

    Args:
      max_queued: requests that may wait, beside as many as may run; None: any number.
      observer: told of steps, requests and tokens.
      watchdog_seconds: a step that takes longer makes the engine unhealthy until it ends; None: none does.
    """

    def __init__(
        self,
        runner: Steps,
        *,
        max_queued: int | None = None,
        observer: Observer | None = None,
        watchdog_seconds: float | None = None,
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
        self._reports = Reports(observer)
        self._most = math.inf if max_queued is None else max_queued + runner.dp * runner.max_running
        self._watchdog = watchdog_seconds
        self._lock = threading.Condition()
        self._arrived: list[Request] = []
        self._aborted: list[Request] = []
        self._held = 0  # requests that have not ended
        self._refusing: str | None = None
        self._stopping = False
        self._dead: str | None = None
        self._failures = 0
        self._deadlines = Deadlines()
        self._step_began: float | None = None
        self._steps = 0
        self._last_step: StepReport | None = None
        self._speculation = Speculation() if runner.draft_tokens else None
        self._thread = threading.Thread(target=self._loop, name="engine", daemon=True)

    @property
    def alive(self) -> bool:
        return self._thread.is_alive() and self._dead is None

    @property
    def unhealthy_reason(self) -> str | None:
        """Why no answers are to be expected now; None: all is well."""
        if self._dead:
            return self._dead
        if not self._thread.is_alive():
            return "the engine is not running."
        began = self._step_began
        if self._watchdog is not None and began is not None and (took := time.monotonic() - began) > self._watchdog:
            return f"a step has been running for {took:.0f} s; --watchdog is {self._watchdog:g}."
        return None

    @property
    def idle(self) -> bool:
        """Nothing waits or runs, and no page is in use."""
        now = self.status()
        return not (now.waiting or now.running or now.pages_used)

    @property
    def speculation(self) -> Speculation | None:
        """None: the engine runs without speculation."""
        return self._speculation

    def status(self) -> EngineStatus:
        """Numbers for people and metrics; those of a step in progress may already be in some of them."""
        groups, counts = self._scheduler.groups, self._scheduler.counts
        return EngineStatus(
            waiting=len(self._arrived) + len(self._scheduler.waiting),
            running=sum(len(group.running) for group in groups),
            pages_total=sum(group.pages.count for group in groups),
            pages_free=sum(group.pages.free for group in groups),
            pages_cached=sum(group.pages.cached for group in groups),
            prefix_queries=counts.prefix_queries,
            prefix_hits=counts.prefix_hits,
            preemptions=counts.preemptions,
            steps=self._steps,
            last_step=self._last_step,
            speculation=self._speculation,
            compiling=self._runner.compiling,
        )

    def start(self) -> None:
        self._thread.start()

    def submit(self, request: Request) -> None:
        """Queues a request; its events come through `request.emit`.

        Raises:
          EngineDead, QueueFull, ValueError: as `submit_all`.
        """
        self.submit_all([request])

    def submit_all(self, requests: Sequence[Request]) -> None:
        """Queues all of these requests, or none.

        Raises:
          EngineDead: no more requests are taken.
          QueueFull: there is no room in the queue for all of them.
          ValueError: one is longer than the cache.
        """
        held = self._runner.pages_per_group * self._runner.page_size
        for request in requests:
            if request.longest > held:
                raise ValueError(f"max_tokens: prompt and answer need {request.longest} places, the cache has {held}.")
        with self._lock:
            if self._dead or self._refusing:
                raise EngineDead(self._dead or self._refusing)
            if self._held + len(requests) > self._most:
                raise QueueFull(f"{self._held} requests run or wait already, {self._most} may. Try again later.")
            for request in requests:
                request.arrived = time.monotonic()
            self._held += len(requests)
            self._arrived.extend(requests)
            self._lock.notify_all()

    def abort(self, request: Request) -> None:
        """Drops a request, whatever its state, before the next step; no further events come after that step."""
        with self._lock:
            self._aborted.append(request)
            self._lock.notify_all()

    def drain(self, timeout: float | None = None) -> bool:
        """Takes no more requests, and waits for those that it has.

        Returns:
          Whether all of them ended within `timeout` seconds. `stop` is still to be called.
        """
        with self._lock:
            self._refusing = "the server is stopping."
            return self._lock.wait_for(lambda: not self._held, timeout)

    def stop(self, timeout: float | None = None) -> None:
        """Ends the loop after the step in progress. Requests that are not done fail."""
        with self._lock:
            self._refusing, self._stopping = "the server is stopping.", True
            self._lock.notify_all()
        if self._thread.is_alive():
            self._thread.join(timeout)

    def _loop(self) -> None:
        try:
            while self._receive():
                self._expire()
                if self._scheduler.busy:
                    self._step()
        except BaseException as error:
            log.exception("the engine's own loop failed")
            self._dead = f"the engine's loop failed ({type(error).__name__})."
        finally:
            self._fail_all()
            if self._speculation:
                log.info("speculation: %s", self._speculation)

    def _receive(self) -> bool:
        """Takes in what has been submitted and aborted, and waits for work; False at the end."""
        with self._lock:
            while not (self._arrived or self._aborted or self._stopping or self._scheduler.busy):
                self._lock.wait()
            for request in self._arrived:
                self._scheduler.add(request)
                self._deadlines.add(request)
            aborted = self._aborted
            self._arrived, self._aborted = [], []
        for request in aborted:
            self._end(request, "abort")
        return not (self._stopping or self._dead)

    def _expire(self) -> None:
        for request, kind, message in self._deadlines.over(self._scheduler.requests):
            self._fail(request, message, kind)

    def _step(self) -> None:
        began, preempted = time.monotonic(), self._scheduler.counts.preemptions
        planned = self._scheduler.schedule()
        if not any(planned):
            raise RuntimeError("requests wait and none can run")
        self._reports.preempted(self._scheduler.counts.preemptions - preempted)
        step = [self._works(group) for group in planned]
        if not any(step):
            return
        for scheduled, _ in (part for group in step for part in group):
            self._reports.started(scheduled.request)
        report = describe([[(scheduled.request, work) for scheduled, work in group] for group in step], self._runner.cp)
        self._step_began = dispatched = time.monotonic()
        try:
            results = self._runner.step([[work for _, work in group] for group in step])
        except Exception as error:
            log.exception("a step failed")
            # Where it was refused before it ran, whoever's work it was is to blame, and the others lose nothing.
            refused = self._refused(step) if isinstance(error, ValueError) else []
            for request in refused:
                self._fail(request, "The request's next step is not one that can be run.", "internal")
            if not refused:
                self._recover([scheduled.request for group in step for scheduled, _ in group])
            return
        finally:
            self._step_began, ended = None, time.monotonic()
        self._failures = 0
        for group, outcomes in zip(step, results, strict=True):
            for (scheduled, _), outcome in zip(group, outcomes, strict=True):
                self._take(scheduled, outcome, ended)
        self._steps += 1
        seconds = time.monotonic() - began
        self._last_step = dataclasses.replace(report, seconds=seconds, host_seconds=seconds - (ended - dispatched))
        self._reports.step(self._last_step)

    def _works(self, group: Sequence[Scheduled]) -> list[tuple[Scheduled, StepRequest]]:
        """What goes wrong with one request's grammar is no other request's concern."""
        works = []
        for scheduled in group:
            try:
                works.append((scheduled, scheduled.work()))
            except GrammarError as error:
                self._fail(scheduled.request, str(error), "grammar")
            except Exception:
                log.exception("a request's next token could not be prepared")
                self._fail(scheduled.request, "The request's next token could not be prepared.", "internal")
        return works

    def _refused(self, step: Sequence[Sequence[tuple[Scheduled, StepRequest]]]) -> list[Request]:
        """Requests whose works can't be run, each looked at alone."""
        refused = []
        for scheduled, work in (part for group in step for part in group):
            try:
                self._runner.check(work)
            except ValueError:
                refused.append(scheduled.request)
        return refused

    def _take(self, scheduled: Scheduled, outcome: StepResult, now: float) -> None:
        """What goes wrong with one request's text, or its owner, is no other request's concern."""
        request = scheduled.request
        if self._speculation and outcome.sampled:
            before = self._speculation
            held = len(outcome.sampled) - 1
            self._speculation = Speculation(before.drafted + len(request.drafts), before.accepted + held)
        try:
            events = take(scheduled, outcome)
            self._scheduler.taken(request)
            last = events[-1] if events else None
            for event in events:
                if isinstance(event, Token):
                    self._reports.token(request, now)
            if isinstance(last, Finished):  # pages first: whoever is told of the end may look at them
                self._end(request, last.reason)
            for event in events:
                request.emit(event)
        except GrammarError as error:
            self._fail(request, str(error), "grammar")
        except Exception:
            log.exception("a request's output could not be made or told")
            self._fail(request, "The request's output could not be made.", "internal")

    def _recover(self, failed: Sequence[Request]) -> None:
        """The donated cache may be gone: the step's requests fail, and all others are computed again, in a new cache."""
        for request in failed:
            self._fail(request, "The step that this request was part of failed.", "step")
        self._scheduler.restart()
        self._failures += 1
        try:
            self._runner.reset()
        except Exception:
            log.exception("no new cache could be made")
            self._dead = "a step failed, and no new cache could be made."
        if self._failures >= _FAILURES_IN_A_ROW:
            self._dead = f"{self._failures} steps failed in a row."
        if self._dead:
            log.error("the engine gives up: %s", self._dead)

    def _fail_all(self) -> None:
        with self._lock:
            self._stopping = True
            for request in self._arrived:
                self._scheduler.add(request)
            self._arrived = []
        for request in list(self._scheduler.requests):
            if self._dead:
                self._fail(request, f"The engine has stopped: {self._dead}", "dead")
            else:
                self._fail(request, "The server is stopping.", "stopping")

    def _fail(self, request: Request, message: str, kind: FailedKind) -> None:
        self._end(request, kind)
        try:
            request.emit(Failed(message, kind))
        except Exception:  # an owner that can't be told must not keep the others from being told
            log.exception("a request's owner could not be told of its failure")

    def _end(self, request: Request, reason: str) -> None:
        """Takes a request out, and its pages back. Nothing, if it has ended before."""
        if self._scheduler.remove(request):
            with self._lock:
                self._held -= 1
                self._lock.notify_all()
            self._reports.finished(request, reason)
