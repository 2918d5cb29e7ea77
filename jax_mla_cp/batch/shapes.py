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
    """Where things are in one dp group's part of the array."""

    layers: int
    pages_per_layer: int
    page_size: int

    def __post_init__(self) -> None:
        for name, least in (("layers", 1), ("pages_per_layer", 1), ("page_size", 1)):
            if getattr(self, name) < least:
                raise ConfigError(f"cache: {name} must be at least {least}, got {getattr(self, name)}.")
        # A slot out of range plus the last layer's offset must still be an int32.
        if 3 * self.total_slots >= 2**31:
            raise ConfigError(
                f"cache: {self.pages_per_layer} pages of {self.page_size} tokens x {self.layers} layers are "
                f"{self.total_slots} slots; int32 indices allow {2**31 // 3}. Use fewer pages (--kv-pages)."
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

    def no_page(self, count: int) -> np.ndarray:
        """`count` different page ids that are in no layer."""
        return self.total_pages + np.arange(count, dtype=np.int32)

    def no_slot(self, count: int) -> np.ndarray:
        """`count` different slots that are in no layer."""
        return self.total_slots + np.arange(count, dtype=np.int32)


@dataclasses.dataclass(frozen=True)
class BatchShape:
    """What is the same in the shapes of all steps, per dp group."""

    dp: int
    cp: int
    requests: int
    """Most requests in a step; a multiple of cp."""
    table_width: int
    """Pages of the longest request."""
    expanded_keys: int
    """Keys that the expanded form has room for, a multiple of the page size; 0: every row is absorbed."""
    cache: CacheShape
    form: Form = "auto"
    draft_tokens: int = 0
    """Most drafts of a request, and how many the step proposes; 0: no speculation."""

    @property
    def samples(self) -> int:
        """Places for sampled tokens, per request."""
        return 1 + self.draft_tokens

    @property
    def fresh(self) -> int:
        """Most pages of a request that a step begins and does not fill: the last, and those that recycled drafts reach."""
        return 1 + -(-max(self.draft_tokens - 1, 0) // self.cache.page_size)

    def __post_init__(self) -> None:
        if self.requests < 1 or self.requests % self.cp:
            raise ValueError(f"requests must be a positive multiple of cp={self.cp}, got {self.requests}.")
        if self.expanded_keys % self.cache.page_size:
            raise ValueError(
                f"expanded_keys must be a multiple of page_size={self.cache.page_size}, got {self.expanded_keys}."
            )


@dataclasses.dataclass(frozen=True)
class StepShape:
    """What differs between the programs: the shape of one step."""

    tokens: int
    """Of each rank's buffer."""
    absorbed_tokens: int
    """The first so many tokens of a buffer may be of absorbed rows; only they take that form's products."""
    expanded_keys: int
    """`BatchShape.expanded_keys`, or 0: the step has no expanded row."""
    scored: bool = False
    """The step also tells the log-probability of the token after each token."""
