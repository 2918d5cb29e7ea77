"""`Pipeline`: the steps that have been dispatched and not read."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import time
from collections import deque
from collections.abc import Iterator, Sequence

from jax_mla_cp.engine.request import Request
from jax_mla_cp.engine.scheduled_request import PreparedRequest
from jax_mla_cp.engine.step_runner import PendingStep, StepRunner
from jax_mla_cp.step.results import RunnerOutput


@dataclasses.dataclass(frozen=True)
class StepInFlight:
    """A step that has been dispatched."""

    pending: PendingStep
    groups: Sequence[Sequence[PreparedRequest]]
    """Per dp group, in the order of the results."""
    overlapped: bool
    """True if it was dispatched before the step before it had been read."""

    @functools.cached_property
    def parts(self) -> list[PreparedRequest]:
        return list(itertools.chain(*self.groups))


class Pipeline:
    """The steps in flight on a runner, oldest first. Not thread-safe: the engine's thread owns it."""

    def __init__(self, runner: StepRunner):
        self._runner = runner
        self._steps: deque[StepInFlight] = deque()
        self.running_since: float | None = None
        """When the oldest step began, as far as the host can tell; None: none is in flight. May be read from any thread."""
        self.runner_seconds = 0.0
        """Time spent in the runner, in all."""

    def __len__(self) -> int:
        return len(self._steps)

    @property
    def needs_host(self) -> bool:
        """True if the next step can't be prepared before the steps in flight are read."""
        return any(
            part.request.follows_output and not part.request.ended for step in self._steps for part in step.parts
        )

    def dispatch(self, groups: Sequence[Sequence[PreparedRequest]]) -> None:
        """Dispatches a step and moves its requests past it. Raises as `StepRunner.dispatch`; the requests stay where they are then."""
        with self._in_runner():
            pending = self._runner.dispatch([[part.step_request for part in group] for group in groups])
            self._steps.append(StepInFlight(pending, groups, overlapped=bool(self._steps)))
        for part in self._steps[-1].parts:
            part.advance()

    def read(self) -> tuple[StepInFlight, RunnerOutput]:
        """Waits for the oldest step. Raises what it failed with; it stays in flight then."""
        with self._in_runner():
            output = self._steps[0].pending.result()
            step = self._steps.popleft()
        if self._steps:
            self.running_since = time.monotonic()
        return step, output

    def clear(self) -> list[Request]:
        """Gives up all steps, whose results are lost. Returns their requests."""
        lost = [part.request for step in self._steps for part in step.parts]
        self._steps.clear()
        self.running_since = None
        return lost

    @contextlib.contextmanager
    def _in_runner(self) -> Iterator[None]:
        began = time.monotonic()
        if self.running_since is None:
            self.running_since = began
        try:
            yield
        finally:
            self.runner_seconds += time.monotonic() - began
            if not self._steps:
                self.running_since = None
