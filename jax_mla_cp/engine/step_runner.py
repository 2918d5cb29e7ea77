"""The interface between the engine and the model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from jax_mla_cp.batch.step_request import StepRequest
from jax_mla_cp.step.compile_progress import CompileProgress
from jax_mla_cp.step.results import RunnerOutput


class PendingStep(Protocol):
    """A step that has been dispatched."""

    def result(self) -> RunnerOutput:
        """Waits for the step and returns its results. Raises what it failed with."""
        ...


class StepRunner(Protocol):
    """`jax_mla_cp.step.runner.Runner`, or a stand-in for it."""

    prefill_chunk: int
    max_running: int

    @property
    def runs_ahead(self) -> bool:
        """True if a step may be dispatched before the one before it has been read, with tokens named by their slots."""

    @property
    def dp(self) -> int: ...

    @property
    def draft_tokens(self) -> int: ...

    @property
    def page_size(self) -> int: ...

    @property
    def pages_per_group(self) -> int: ...

    @property
    def compiling(self) -> CompileProgress | None:
        """The compilation in progress; None: nothing is being compiled. Read from any thread."""

    def check(self, request: StepRequest, /) -> None:
        """Checks one request as `dispatch` would.

        Raises:
          ValueError: it can't be run.
        """

    def dispatch(self, groups: Sequence[Sequence[StepRequest]], /) -> PendingStep:
        """Starts one step. Steps run in the order in which they are dispatched. What the requests refer to may change
        afterwards.

        Args:
          groups: per dp group, its requests.

        Raises:
          ValueError: a request can't be run. No request has run then.
          RunnerFailed: no step can be run any more, and `reset` doesn't help. Also raised by `PendingStep.result`.
        """
        ...

    def reset(self) -> None:
        """Replaces the KV cache by an empty one."""
