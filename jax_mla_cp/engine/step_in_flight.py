"""`StepInFlight`: a step between its dispatch and its reading."""

from __future__ import annotations

import dataclasses

from jax_mla_cp.engine.group_scheduler import DispatchedRequest
from jax_mla_cp.engine.observer import StepReport
from jax_mla_cp.engine.request import Request
from jax_mla_cp.engine.step_runner import PendingStep


@dataclasses.dataclass(frozen=True)
class StepInFlight:
    """A dispatched step that has not been read."""

    pending: PendingStep
    groups: list[list[DispatchedRequest]]
    """Per dp group, in the order of the results."""
    report: StepReport
    began: float
    """When it was scheduled."""

    @property
    def requests(self) -> list[Request]:
        return [dispatched.request for group in self.groups for dispatched in group]

    @property
    def may_be_overtaken(self) -> bool:
        """True if the next step can be prepared before this one is read."""
        return not any(request.follows_output and not request.ended for request in self.requests)
