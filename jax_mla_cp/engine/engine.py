"""The loop: schedule, step, hand out the tokens, on a thread of its own."""

from __future__ import annotations

import dataclasses
import logging
import threading
from collections.abc import Sequence
from typing import Literal, Protocol

from jax_mla_cp.batch import Work
from jax_mla_cp.engine.request import Failed, Request, Token
from jax_mla_cp.engine.scheduler import Scheduled, Scheduler
from jax_mla_cp.runner import Outcome, Sampled

log = logging.getLogger(__name__)

_FAILURES_IN_A_ROW = 3


class Steps(Protocol):
    """What the engine needs of `jax_mla_cp.runner.Runner`."""

    prefill_chunk: int
    max_running: int

    @property
    def dp(self) -> int: ...

    @property
    def draft_tokens(self) -> int: ...

    @property
    def page_size(self) -> int: ...

    @property
    def pages_per_group(self) -> int: ...

    def step(self, work: Sequence[Sequence[Work]]) -> list[list[Outcome]]: ...

    def reset(self) -> None: ...


@dataclasses.dataclass(frozen=True)
class Speculation:
    """Drafts since the start: how many were verified, and how many of them were what the model sampled."""

    drafted: int = 0
    accepted: int = 0

    @property
    def acceptance_rate(self) -> float:
        """0 before the first draft."""
        return self.accepted / self.drafted if self.drafted else 0.0

    def __str__(self) -> str:
        return f"{self.accepted} of {self.drafted} drafts accepted ({self.acceptance_rate:.0%})"


class EngineDead(RuntimeError):
    """The engine has stopped and takes no more requests."""


class Engine:
    """Runs requests on a model. `submit` and `abort` may be called from any thread."""

    def __init__(self, runner: Steps):
        self._runner = runner
        self._scheduler = Scheduler(
            groups=runner.dp,
            pages_per_group=runner.pages_per_group,
            page_size=runner.page_size,
            max_running=runner.max_running,
            prefill_chunk=runner.prefill_chunk,
        )
        self._lock = threading.Condition()
        self._arrived: list[Request] = []
        self._aborted: list[Request] = []
        self._stopping = False
        self._dead: str | None = None
        self._failures = 0
        self.speculation: Speculation | None = Speculation() if runner.draft_tokens else None
        """None: the engine runs without speculation."""
        self._thread = threading.Thread(target=self._loop, name="engine", daemon=True)

    @property
    def alive(self) -> bool:
        return self._thread.is_alive() and self._dead is None

    @property
    def idle(self) -> bool:
        """Nothing waits or runs, and every page is free."""
        with self._lock:
            return not (self._arrived or self._scheduler.busy) and self.free_pages == self.total_pages

    @property
    def free_pages(self) -> int:
        return sum(pages.free for pages in self._scheduler.pages)

    @property
    def total_pages(self) -> int:
        return sum(pages.count for pages in self._scheduler.pages)

    def start(self) -> None:
        self._thread.start()

    def submit(self, request: Request) -> None:
        """Queues a request; its events come through `request.emit`.

        Raises:
          EngineDead: no more requests are taken.
        """
        with self._lock:
            if self._stopping or self._dead:
                raise EngineDead(self._dead or "the server is stopping")
            self._arrived.append(request)
            self._lock.notify()

    def abort(self, request: Request) -> None:
        """Drops a request, whatever its state, before the next step; no further events come after that step."""
        with self._lock:
            self._aborted.append(request)
            self._lock.notify()

    def stop(self, timeout: float | None = None) -> None:
        """Ends the loop after the step in progress. Requests that are not done fail."""
        with self._lock:
            self._stopping = True
            self._lock.notify()
        if self._thread.is_alive():
            self._thread.join(timeout)

    def _loop(self) -> None:
        try:
            while self._receive():
                step = self._scheduler.schedule()
                if any(step):
                    self._step(step)
        except Exception as error:
            log.exception("the engine's own loop failed")
            self._dead = f"the engine's loop failed ({type(error).__name__})"
        finally:
            self._fail_all(self._dead or "The server is stopping.")
            if self.speculation:
                log.info("speculation: %s", self.speculation)

    def _receive(self) -> bool:
        """Takes in what has been submitted and aborted, and waits for work; False at the end."""
        with self._lock:
            while not (self._arrived or self._aborted or self._stopping or self._scheduler.busy):
                self._lock.wait()
            for request in self._arrived:
                self._scheduler.add(request)
            for request in self._aborted:
                self._scheduler.remove(request)
            self._arrived, self._aborted = [], []
            return not (self._stopping or self._dead)

    def _step(self, step: list[list[Scheduled]]) -> None:
        try:
            results = self._runner.step([[s.work() for s in group] for group in step])
        except Exception:
            log.exception("a step failed; its requests get an error")
            self._recover()
            return
        self._failures = 0
        for group, outcomes in zip(step, results, strict=True):
            for scheduled, outcome in zip(group, outcomes, strict=True):
                self._take(scheduled, outcome)

    def _take(self, scheduled: Scheduled, outcome: Outcome) -> None:
        request, held = scheduled.request, max(len(outcome.sampled) - 1, 0)
        if self.speculation and outcome.sampled:
            before = self.speculation
            self.speculation = Speculation(before.drafted + len(request.drafts), before.accepted + held)
        self._scheduler.advance(scheduled, held)
        for sampled in outcome.sampled:
            if not self._append_or_fail(request, sampled):
                return  # what else was sampled follows the end
        request.drafts = outcome.drafts[: max(request.left - 1, 0)]

    def _append_or_fail(self, request: Request, sampled: Sampled) -> bool:
        """Whether the request goes on. What goes wrong with one request's text is no other request's concern."""
        try:
            return self._append(request, sampled)
        except Exception:
            log.exception("a request's output could not be made")
            self._fail(request, "The request's output could not be made.")
            return False

    def _append(self, request: Request, sampled: Sampled) -> bool:
        ends = sampled.token in request.stop_tokens
        text = "" if ends else request.text.push(sampled.token)
        reason: Literal["stop", "length"] | None = None
        if ends or request.text.stopped:
            reason = "stop"
        elif request.left == 1:
            reason = "length"
        if reason:  # pages first: whoever is told of the end may look at them
            self._scheduler.remove(request)
        request.append(Token(sampled.token, text, sampled.logprob, sampled.top_tokens, sampled.top_logprobs), reason)
        return reason is None

    def _recover(self) -> None:
        """After a step that failed the donated cache may be gone: every admitted request fails, the waiting ones go on."""
        for request in [r for group in self._scheduler.running for r in group]:
            self._fail(request, "The step that this request was part of failed.")
        self._failures += 1
        try:
            self._runner.reset()
        except Exception:
            log.exception("no new cache could be made")
            self._failures = _FAILURES_IN_A_ROW
        if self._failures >= _FAILURES_IN_A_ROW:
            self._dead = f"{self._failures} steps failed in a row."
            log.error("the engine gives up: %s", self._dead)

    def _fail_all(self, message: str) -> None:
        with self._lock:
            self._stopping = True
            requests = [*self._arrived, *self._scheduler.waiting, *(r for g in self._scheduler.running for r in g)]
            self._arrived = []
        for request in requests:
            self._fail(request, message)

    def _fail(self, request: Request, message: str) -> None:
        self._scheduler.remove(request)
        try:
            request.emit(Failed(message))
        except Exception:  # an owner that can't be told must not keep the others from being told
            log.exception("a request's owner could not be told of its failure")
