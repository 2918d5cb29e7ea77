"""`LayerInputs`: the inputs that all layers share."""

from __future__ import annotations

import dataclasses

import jax
from jaxtyping import Array, Bool, Float, Int32

from jax_mla_cp.batch.rows import Rows


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LayerInputs:
    """The inputs that all layers of a step share, on one device."""

    valid: Bool[Array, " T"]
    """False for padding."""
    cos: Float[Array, "T r/2"]
    sin: Float[Array, "T r/2"]
    slot_mapping: Int32[Array, " cp*T"]
    pages_to_zero: Int32[Array, " Z"]
    key_pages: Int32[Array, " K/page"]
    num_keys: Int32[Array, " 1"]
    expanded: Rows
    absorbed: Rows
    row_page_table: Int32[Array, "B W"]
    """The pages of each row of `absorbed` (`cache.row_pages`)."""
    absorbed_tokens: int = dataclasses.field(metadata={"static": True})
    """Tokens of absorbed rows are among the first `absorbed_tokens` of the buffer."""
