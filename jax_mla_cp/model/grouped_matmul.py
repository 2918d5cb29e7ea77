"""Rows sorted by expert, times each expert's matrix: the one place where experts multiply."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int32

from jax_mla_cp.mesh import vary_like

_LARGEST_BLOCK = 128


def grouped_matmul(
    rows: Float[Array, "M K"], weights: Float[Array, "E K N"], group_sizes: Int32[Array, " E"]
) -> Float[Array, "M N"]:
    """Rows `[sum(group_sizes[:e]), sum(group_sizes[:e + 1]))` times `weights[e]`; rows past all groups give zeros.

    On CPU a loop over blocks of rows of one expert each, with a dynamic trip count: XLA's `ragged_dot` multiplies every
    row by every expert there. Elsewhere `lax.ragged_dot`.
    """
    if jax.default_backend() == "cpu":
        return _blocks(rows, weights, group_sizes)
    used = jnp.arange(rows.shape[0]) < group_sizes.sum()
    return jnp.where(used[:, None], lax.ragged_dot(rows, weights, group_sizes), 0)


def _blocks(rows: jax.Array, weights: jax.Array, group_sizes: jax.Array) -> jax.Array:
    count, experts = rows.shape[0], weights.shape[0]
    # About one block per expert when the rows are spread evenly; never so small that the loop is all overhead.
    size = min(count, max(8, min(_LARGEST_BLOCK, 1 << (count // experts).bit_length())))
    group_end = jnp.cumsum(group_sizes)
    blocks = -(-group_sizes // size)
    block_end = jnp.cumsum(blocks)

    def step(i: jax.Array, out: jax.Array) -> jax.Array:
        expert = jnp.searchsorted(block_end, i, side="right").astype(jnp.int32)
        first = group_end[expert] - group_sizes[expert] + (i - (block_end[expert] - blocks[expert])) * size
        at = jnp.minimum(first, count - size)  # the last block is moved back into the array; `mine` masks the rest
        row = at + jnp.arange(size)
        mine = (row >= first) & (row < group_end[expert])
        weight = lax.dynamic_index_in_dim(weights, expert, keepdims=False)
        product = lax.dynamic_slice_in_dim(rows, at, size) @ weight
        kept = lax.dynamic_slice_in_dim(out, at, size)
        return lax.dynamic_update_slice_in_dim(out, jnp.where(mine[:, None], product, kept), at, 0)

    out = vary_like(jnp.zeros((count, weights.shape[2]), rows.dtype), rows, weights, group_sizes)
    return lax.fori_loop(0, block_end[-1], step, out)
