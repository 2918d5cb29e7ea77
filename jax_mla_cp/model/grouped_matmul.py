"""Rows sorted by expert, times each expert's matrix: the one place where experts multiply."""

from __future__ import annotations

import functools
from types import ModuleType

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int32

from jax_mla_cp.mesh import vary_like

_LARGEST_BLOCK = 128


def grouped_matmul(
    rows: Float[Array, "M K"],
    weights: Float[Array, "G K N"],
    group_sizes: Int32[Array, " E"],
    first: Int32[Array, ""] | int = 0,
) -> Float[Array, "M N"]:
    """Rows `[sum(group_sizes[:e]), sum(group_sizes[:e + 1]))` times `weights[first + e]`. Rows past all groups are undefined.

    Undefined is meant: on Hopper they are memory that nobody wrote, NaN included. Select what exists, don't multiply by 0.

    On CPU a loop over blocks of rows of one expert each, with a dynamic trip count: XLA's `ragged_dot` multiplies every
    row by every expert there. On Hopper a Pallas kernel (bfloat16, and sizes that its tiles divide). Elsewhere `lax.ragged_dot`,
    and for a single group a plain product of all rows.
    """
    if jax.default_backend() == "cpu":
        return _blocks(rows, weights, group_sizes, first)
    hopper = _hopper()
    if hopper and hopper.fits(rows, weights):
        pad = -rows.shape[0] % hopper.TILE
        padded = jnp.pad(rows, ((0, pad), (0, 0)))
        return hopper.hopper_grouped_matmul(padded, weights, group_sizes, first)[: rows.shape[0]]
    if len(group_sizes) == 1:
        weight = lax.dynamic_index_in_dim(weights, first, keepdims=False)
        # Float32 in full: the keys' roped part passes through this product (model/mla.py), and TF32 would round it.
        return jnp.matmul(rows, weight, precision=lax.Precision.HIGHEST if rows.dtype == jnp.float32 else None)
    return lax.ragged_dot(rows, lax.dynamic_slice_in_dim(weights, first, len(group_sizes)), group_sizes)


def group_alignment(rows: int, experts: int) -> int:
    """Multiples of what the groups should begin at, with this many rows: a tile of rows of two experts is computed twice.

    With few rows an expert the padding would cost more than it saves.
    """
    hopper = _hopper()
    return hopper.TILE if hopper and rows >= experts * hopper.TILE else 1


@functools.cache
def _hopper() -> ModuleType | None:
    """The kernel's module, if the devices are Hopper GPUs: imported only there, because Pallas for GPUs is experimental."""
    device = jax.devices()[0]
    if device.platform != "gpu" or device.compute_capability != "9.0":
        return None
    from jax_mla_cp.model import hopper

    return hopper


def _blocks(rows: jax.Array, weights: jax.Array, group_sizes: jax.Array, first_group: jax.Array | int) -> jax.Array:
    count, experts = rows.shape[0], len(group_sizes)
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
        weight = lax.dynamic_index_in_dim(weights, first_group + expert, keepdims=False)
        product = lax.dynamic_slice_in_dim(rows, at, size) @ weight
        kept = lax.dynamic_slice_in_dim(out, at, size)
        return lax.dynamic_update_slice_in_dim(out, jnp.where(mine[:, None], product, kept), at, 0)

    out = vary_like(jnp.zeros((count, weights.shape[2]), rows.dtype), rows, weights, group_sizes)
    return lax.fori_loop(0, block_end[-1], step, out)
