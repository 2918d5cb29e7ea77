"""The arrays of a step: what the model and the sampler see on the devices.

`jax_mla_cp.batch.layout` makes them on the host, `jax_mla_cp.batch.packing` carries them to the devices. A field's
declaration holds its shape on one device and, beside it, how the mesh divides it.
"""

from __future__ import annotations

import dataclasses
from dataclasses import field
from typing import Any, TypeAlias

import jax
from jax.sharding import PartitionSpec
from jaxtyping import Float, Float32, Int32, UInt32

from jax_mla_cp.batch.rows import Rows
from jax_mla_cp.mesh import DP, TOKENS

Array: TypeAlias = Any
"""`np.ndarray` on the host, `jax.Array` on the devices."""


_PER_RANK = {"spec": PartitionSpec(TOKENS)}
"""Each cp rank of each dp group has its own part, equal over tp."""
_PER_GROUP = {"spec": PartitionSpec(DP)}
"""Equal on all devices of a dp group."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SamplingArrays:
    """`SamplingParams` of a device's places: `J` is `(1 + d) I / cp` here, for its share of the requests."""

    temperature: Float32[Array, " J"]
    """0: the most likely token, and where nothing is sampled."""
    top_p: Float32[Array, " J"]
    top_k: Int32[Array, " J"]
    min_p: Float32[Array, " J"]
    seed: UInt32[Array, "J 2"]
    position: Int32[Array, " J"]
    """Position of the token that is sampled."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SpeculationArrays:
    """Drafts of the group's `I` requests, equal on its cp ranks."""

    drafts: Int32[Array, "I d"]
    """The drafts among the request's tokens; -1 where there is none."""
    first_position: Int32[Array, " I"]
    """Position of the first token that is sampled after."""
    writable_end: Int32[Array, " I"]
    """Positions below it have a slot; 0 for places without a request."""
    table_row: Int32[Array, " I"]
    """The request's row in the page table; 0 for places without a request."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TableChanges:
    """Entries of a dp group's resident page table that a step changes, in `E` places (`BatchShape.table_changes`)."""

    index: Int32[Array, " E"]
    """`row * W + column`; beyond the table, and each another, in places without a change."""
    page: Int32[Array, " E"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Batch:
    """The arrays of a step.

    `T` tokens of a rank's buffer, `I` requests, `W` pages of the longest one, `B = 2 I` rows, `K` expanded keys, `d` drafts
    of a request, `J = I (1 + d)` places for sampled tokens, request after request, `Z` pages to zero.
    """

    tokens: Int32[Array, " T"] = field(metadata=_PER_RANK)
    next_tokens: Int32[Array, " T"] = field(metadata=_PER_RANK)
    """The token after each; -1: the step samples it, or it is unknown."""
    embeds: Float[Array, "T D"] | None = field(metadata=_PER_RANK)
    """Input embeddings in place of the tokens'."""
    positions: Int32[Array, " T"] = field(metadata=_PER_RANK)
    num_tokens: Int32[Array, " 1"] = field(metadata=_PER_RANK)
    """Tokens of the rank; the rest of its buffer is padding."""
    slot_mapping: Int32[Array, " cp*T"] = field(metadata=_PER_GROUP)
    """The cache slot of each token's latent, rank after rank."""
    pages_to_zero: Int32[Array, " Z"] = field(metadata=_PER_GROUP)
    """Pages that the step begins and does not fill (`BatchShape.max_pages_to_zero` of each request)."""
    page_table: Int32[Array, "I W"] | None = field(metadata=_PER_GROUP)
    """The requests' pages; `Rows.request` names a row. None in a batch for devices that have the table (`table_changes`)."""
    table_changes: TableChanges | None = field(metadata=_PER_GROUP)
    """Changes of the table that the devices have. None in a batch that brings a `page_table`."""
    key_pages: Int32[Array, " K/page_size"] = field(metadata=_PER_GROUP)
    """Pages of the packed keys; none in a step without expanded rows."""
    num_keys: Int32[Array, " 1"] = field(metadata=_PER_GROUP)
    """Packed keys in use."""
    expanded: Rows = field(metadata=_PER_RANK)
    absorbed: Rows = field(metadata=_PER_RANK)
    last_index: Int32[Array, " J"] = field(metadata=_PER_RANK)
    """Index in the rank's buffer of the tokens that are sampled after; `T` for those of other ranks."""
    sampling: SamplingArrays = field(metadata=_PER_RANK)
    slots: Int32[Array, " I"] | None = field(metadata=_PER_GROUP)
    """The request slot of each place's sampled token; `I` for none. None with speculation."""
    speculation: SpeculationArrays | None = field(metadata=_PER_GROUP)
    """None without speculation (`d = 0`)."""
    absorbed_tokens: int = field(metadata={"static": True})
    """`StepShape.absorbed_tokens`."""
