"""The engine's state at a moment."""

from __future__ import annotations

import dataclasses

from jax_mla_cp.engine.observer import StepReport
from jax_mla_cp.step.compile_progress import CompileProgress


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


@dataclasses.dataclass(frozen=True)
class EngineStatus:
    """Numbers over all dp groups; counts are since the start."""

    waiting: int
    running: int
    pages_total: int
    pages_free: int
    """Never used, or given back with nothing that could be reused."""
    pages_cached: int
    """Used by no request, but reusable; taken when no free one is left."""
    prefix_queries: int
    """Prompt tokens of the requests that started and looked for pages with them."""
    prefix_hits: int
    """Those of them that were found."""
    preemptions: int
    steps: int
    """Those that succeeded."""
    last_step: StepReport | None
    speculation: Speculation | None
    """None: the engine runs without speculation."""
    compiling: CompileProgress | None = None
    """None: no program is being compiled."""

    @property
    def pages_used(self) -> int:
        return self.pages_total - self.pages_free - self.pages_cached
