"""A snapshot of the engine."""

from __future__ import annotations

import dataclasses

from jax_mla_cp.step.compile_progress import CompileProgress


@dataclasses.dataclass(frozen=True)
class SpeculationStats:
    """Draft tokens since the start."""

    num_drafts: int = 0
    """Drafts that were verified."""
    num_accepted: int = 0
    """Drafts that were equal to the model's own token."""

    @property
    def acceptance_rate(self) -> float:
        """0 before the first draft."""
        return self.num_accepted / self.num_drafts if self.num_drafts else 0.0

    def __str__(self) -> str:
        return f"{self.num_accepted} of {self.num_drafts} drafts accepted ({self.acceptance_rate:.0%})"


@dataclasses.dataclass(frozen=True)
class EngineStatus:
    """Sums over all dp groups. Counts are since the start."""

    waiting: int
    """Requests in the waiting queue."""
    running: int
    pages_total: int
    pages_free: int
    """Pages that hold nothing reusable."""
    pages_cached: int
    """Pages that no request uses, but that can be reused. They are evicted when no page is free."""
    prefix_queries: int
    """Prompt tokens looked up in the prefix cache."""
    prefix_hits: int
    """Prompt tokens found in the prefix cache."""
    preemptions: int
    steps: int
    """Steps that succeeded."""
    speculation: SpeculationStats | None
    """None: the engine runs without speculation."""
    compiling: CompileProgress | None = None
    """None: no program is being compiled."""

    @property
    def pages_used(self) -> int:
        return self.pages_total - self.pages_free - self.pages_cached
