"""`SynchronousRunner`: base class of runners that can't run ahead."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Sequence

from jax_mla_cp.batch.step_request import StepRequest
from jax_mla_cp.step.results import RunnerOutput


@dataclasses.dataclass(frozen=True)
class FinishedStep:
    """A dispatched step whose results are there."""

    output: RunnerOutput

    def result(self) -> RunnerOutput:
        return self.output


class SynchronousRunner(abc.ABC):
    """A runner whose steps have ended when `dispatch` returns."""

    runs_ahead = False
    """Nothing is gained by dispatching a step before the one before it is read."""

    @abc.abstractmethod
    def step(self, groups: Sequence[Sequence[StepRequest]], /) -> RunnerOutput:
        """Runs one step. Arguments and errors as in `Runner.dispatch`."""

    def dispatch(self, groups: Sequence[Sequence[StepRequest]], /) -> FinishedStep:
        """Runs one step."""
        return FinishedStep(self.step(groups))
