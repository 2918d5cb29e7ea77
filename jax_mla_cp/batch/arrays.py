"""What a step is given: its requests' work on the host, and the arrays that become of it on the devices.

`jax_mla_cp.batch.layout` makes the one into the other.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
from jax.sharding import PartitionSpec

from jax_mla_cp.batch.rows import Rows
from jax_mla_cp.mesh import DP, TOKENS


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Batch:
    """The arrays of a step. The comments give each one's shape on a device and how it is sharded.

    `T` tokens of a rank's buffer, `I` requests, `W` pages of the longest one, `B = 2 I` rows, `K` expanded keys, `d` drafts
    of a request, `J = I (1 + d)` places for sampled tokens, request after request.
    """

    tokens: Any  # int32 [T]            P(("dp", "cp"))
    next_tokens: Any  # int32 [T]       P(("dp", "cp"))  the token after each; -1: the step samples it, or nobody knows
    embeds: Any  # float [T, D] or None P(("dp", "cp"))
    positions: Any  # int32 [T]         P(("dp", "cp"))
    num_tokens: Any  # int32 [1]        P(("dp", "cp"))  tokens that exist; the rest of the buffer is padding
    slots: Any  # int32 [cp T]          P("dp")          where each rank's tokens go in the cache
    fresh: Any  # int32 [max(2, I ..)]  P("dp")          pages to zero first, `BatchShape.fresh` of each request
    page_table: Any  # int32 [I, W]     P("dp")
    key_pages: Any  # int32 [K / page]  P("dp")          pages of the packed keys, none without expanded rows
    num_keys: Any  # int32 [1]          P("dp")          keys that the packed ones reach to
    expanded: Rows  # int32 [B]         P(("dp", "cp"))
    absorbed: Rows  # int32 [B]         P(("dp", "cp"))
    last_index: Any  # int32 [J]        P(("dp", "cp"))  where the tokens sampled after are on this rank, or T
    sampling: SamplingArrays
    speculation: SpeculationArrays | None  # None: d = 0
    absorbed_tokens: int = dataclasses.field(metadata={"static": True})  # `StepShape.absorbed_tokens`


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SamplingArrays:
    """Per place, the places of `I / cp` requests on a device: P(("dp", "cp"))."""

    temperature: Any  # float32 [J]; 0 where nothing is sampled
    top_p: Any  # float32 [J]
    top_k: Any  # int32 [J]
    min_p: Any  # float32 [J]
    seed: Any  # uint32 [J, 2]
    position: Any  # int32 [J]: the position of the token that is sampled


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SpeculationArrays:
    """Per request, the same on all cp ranks: P("dp")."""

    drafts: Any  # int32 [I, d]: the guesses among the request's tokens; -1 where there is none
    first: Any  # int32 [I]: the position of the first token that is sampled after
    room: Any  # int32 [I]: positions below may be written; 0 for places without a request


def batch_specs(batch: Batch) -> Batch:
    """A Batch of PartitionSpecs, with None where the batch has None."""
    groups = {"slots", "fresh", "page_table", "key_pages", "num_keys", "speculation"}

    def spec(name: str) -> Any:
        axes = PartitionSpec(DP) if name in groups else PartitionSpec(TOKENS)
        return jax.tree.map(lambda _: axes, getattr(batch, name))

    arrays = {f.name: spec(f.name) for f in dataclasses.fields(Batch) if f.name != "absorbed_tokens"}
    return Batch(**arrays, absorbed_tokens=batch.absorbed_tokens)
