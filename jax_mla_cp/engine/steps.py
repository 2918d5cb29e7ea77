"""What the engine needs of what it steps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from jax_mla_cp.batch.step_request import StepRequest
from jax_mla_cp.step.compile_progress import CompileProgress
from jax_mla_cp.step.results import StepResult


class Steps(Protocol):
    """`jax_mla_cp.step.runner.Runner`, or what stands in for it."""

    prefill_chunk: int
    max_running: int

    @property
    def dp(self) -> int: ...

    @property
    def cp(self) -> int: ...

    @property
    def draft_tokens(self) -> int: ...

    @property
    def page_size(self) -> int: ...

    @property
    def pages_per_group(self) -> int: ...

    @property
    def compiling(self) -> CompileProgress | None:
        """The compilation in progress. Read from any thread."""

    def check(self, work: StepRequest) -> None:
        """Raises ValueError if `step` would for this work alone."""

    def step(self, work: Sequence[Sequence[StepRequest]]) -> list[list[StepResult]]:
        """Raises ValueError for a work that can't be run; nothing has run then."""

    def reset(self) -> None: ...
