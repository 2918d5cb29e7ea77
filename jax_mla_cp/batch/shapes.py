"""The shapes that steps share, and the cache's: what is fixed when a planner is made."""

from __future__ import annotations

import dataclasses
from typing import Any, TypeVar

import jax
import numpy as np
from numpy.typing import NDArray

from jax_mla_cp.batch.form import Form
from jax_mla_cp.config.errors import ConfigError

_Ids = TypeVar("_Ids", NDArray[np.signedinteger[Any]], jax.Array)


@dataclasses.dataclass(frozen=True)
class CacheShape:
    """Sizes of one dp group's part of the cache."""

    layers: int
    pages_per_layer: int
    page_size: int

    def __post_init__(self) -> None:
        for name, least in (("layers", 1), ("pages_per_layer", 1), ("page_size", 1)):
            if getattr(self, name) < least:
                raise ConfigError(name, f"must be at least {least}, got {getattr(self, name)}.")
        # A slot out of range plus the last layer's offset must still be an int32.
        if 3 * self.total_slots >= 2**31:
            raise ConfigError(
                "kv_pages",
                f"{self.pages_per_layer} pages of {self.page_size} tokens x {self.layers} layers are "
                f"{self.total_slots} slots; int32 indices allow {2**31 // 3}. Use fewer pages.",
            )

    @property
    def total_pages(self) -> int:
        return self.layers * self.pages_per_layer

    @property
    def total_slots(self) -> int:
        return self.total_pages * self.page_size

    @property
    def tokens(self) -> int:
        """Tokens that one dp group's pages hold."""
        return self.pages_per_layer * self.page_size

    def slot_of(self, page: _Ids, offset: _Ids) -> _Ids:
        """The slots, within a layer, of places in pages: NumPy arrays on the host, JAX arrays on a device."""
        return page * self.page_size + offset

    def unused_pages(self, count: int) -> NDArray[np.int32]:
        """`count` different page ids that lie outside of every layer."""
        return self.total_pages + np.arange(count, dtype=np.int32)

    def unused_slots(self, count: int) -> NDArray[np.int32]:
        """`count` different slots that lie outside of every layer."""
        return self.total_slots + np.arange(count, dtype=np.int32)


@dataclasses.dataclass(frozen=True)
class BatchShape:
    """Sizes that all steps of a planner share, per dp group."""

    dp: int
    cp: int
    max_requests: int
    """Requests in a step; a multiple of cp."""
    max_pages: int
    """Pages of a request: the width of the page table."""
    expanded_keys: int
    """Capacity of the packed keys, a multiple of the page size; 0: every row is absorbed."""
    cache: CacheShape
    form: Form = "auto"
    draft_tokens: int = 0
    """Drafts of a request, and how many the step proposes; 0: no speculation."""

    @property
    def samples_per_request(self) -> int:
        """Places for a request's sampled tokens."""
        return 1 + self.draft_tokens

    @property
    def max_pages_to_zero(self) -> int:
        """Pages of a request that a step may begin without filling them: its last, and those of recycled drafts."""
        return 1 + -(-max(self.draft_tokens - 1, 0) // self.cache.page_size)

    def table_changes(self, step: StepShape) -> int:
        """Places for entries of the page table that a step changes: all that follow from its tokens. A request with n new tokens
        begins at most 1 + (n - 1) / page_size pages, and those that `max_pages_to_zero` counts for recycled drafts."""
        # At least two: with a single index, XLA's scatter may copy the table.
        return max(2, self.max_requests * self.max_pages_to_zero + -(-self.cp * step.tokens // self.cache.page_size))

    def __post_init__(self) -> None:
        if self.max_requests < 1 or self.max_requests % self.cp:
            raise ValueError(f"max_requests must be a positive multiple of cp={self.cp}, got {self.max_requests}.")
        if self.expanded_keys % self.cache.page_size:
            raise ValueError(
                f"expanded_keys must be a multiple of page_size={self.cache.page_size}, got {self.expanded_keys}."
            )


@dataclasses.dataclass(frozen=True)
class StepShape:
    """Sizes of one step. Each has a program."""

    tokens: int
    """Tokens of each rank's buffer."""
    absorbed_tokens: int
    """Length of the buffer's head that may hold tokens of absorbed rows; only it takes that form's products."""
    expanded_keys: int
    """`BatchShape.expanded_keys`, or 0: the step has no expanded row."""
    prompt_logprobs: bool = False
    """The step also returns the log-probability of the token after each token."""
