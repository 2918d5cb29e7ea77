"""`grouped_matmul`: rows sorted by group, each times its group's matrix."""

from __future__ import annotations

from types import ModuleType
from typing import Literal

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int32

from jax_mla_cp.mesh import vary_like

GroupedMatmul = Literal["hopper", "blocks", "ragged"]
"""Implementations of `grouped_matmul`."""

_LARGEST_BLOCK = 128


def resolve_grouped_matmul() -> GroupedMatmul:
    """Returns the fastest implementation for this process's devices."""
    device = jax.devices()[0]
    if device.platform == "cpu":
        return "blocks"
    return "hopper" if device.platform == "gpu" and device.compute_capability == "9.0" else "ragged"


def grouped_matmul(
    rows: Float[Array, "M K"],
    weights: Float[Array, "G K N"],
    group_sizes: Int32[Array, " E"],
    first: Int32[Array, ""] | int = 0,
    *,
    implementation: GroupedMatmul,
) -> Float[Array, "M N"]:
    """Multiplies rows `[sum(group_sizes[:e]), sum(group_sizes[:e + 1]))` by `weights[first + e]`.

    Rows past all groups are undefined: on Hopper they are memory that nobody wrote, NaN included. Select the rows that
    exist, don't multiply the others by 0.

    Args:
      implementation: "hopper": a Pallas kernel for bfloat16 and for sizes that its tiles divide; other operands run as in
        "ragged". "blocks", for CPUs: a loop over blocks of rows of one group each, with a dynamic trip count (XLA:CPU's
        `ragged_dot` multiplies every row by every group's matrix). "ragged": `lax.ragged_dot`, and for a single group a
        plain product of all rows.
    """
    if implementation == "blocks":
        return _blocks(rows, weights, group_sizes, first)
    if implementation == "hopper" and _hopper().fits(rows, weights):
        hopper = _hopper()
        pad = -rows.shape[0] % hopper.TILE
        padded = jnp.pad(rows, ((0, pad), (0, 0)))
        return hopper.hopper_grouped_matmul(padded, weights, group_sizes, first)[: rows.shape[0]]
    if len(group_sizes) == 1:
        weight = lax.dynamic_index_in_dim(weights, first, keepdims=False)
        # Float32 in full: the keys' roped part passes through this product (model/mla.py), and TF32 would round it.
        return jnp.matmul(rows, weight, precision=lax.Precision.HIGHEST if rows.dtype == jnp.float32 else None)
    return lax.ragged_dot(rows, lax.dynamic_slice_in_dim(weights, first, len(group_sizes)), group_sizes)


def group_alignment(rows: int, groups: int, implementation: GroupedMatmul) -> int:
    """Returns the number of rows that groups should begin at multiples of, when `rows` rows are in all groups.

    The Hopper kernel computes a tile with rows of two groups twice. With few rows per group, padding would cost more.
    """
    return _hopper().TILE if implementation == "hopper" and rows >= groups * _hopper().TILE else 1


def _hopper() -> ModuleType:
    """The kernel's module. It is imported only where it runs, because Pallas for GPUs is experimental."""
    from jax_mla_cp.model import hopper

    return hopper


def _blocks(rows: jax.Array, weights: jax.Array, group_sizes: jax.Array, first_group: jax.Array | int) -> jax.Array:
    count, groups = rows.shape[0], len(group_sizes)
    # About one block per group when the rows are spread evenly; never so small that the loop is all overhead.
    size = min(count, max(8, min(_LARGEST_BLOCK, 1 << (count // groups).bit_length())))
    group_end = jnp.cumsum(group_sizes)
    blocks = -(-group_sizes // size)
    block_end = jnp.cumsum(blocks)

    def step(i: jax.Array, out: jax.Array) -> jax.Array:
        group = jnp.searchsorted(block_end, i, side="right").astype(jnp.int32)
        first = group_end[group] - group_sizes[group] + (i - (block_end[group] - blocks[group])) * size
        start = jnp.minimum(
            first, count - size
        )  # the last block is moved back into the array; `in_block` masks the rest
        row = start + jnp.arange(size)
        in_block = (row >= first) & (row < group_end[group])
        weight = lax.dynamic_index_in_dim(weights, first_group + group, keepdims=False)
        product = lax.dynamic_slice_in_dim(rows, start, size) @ weight
        kept = lax.dynamic_slice_in_dim(out, start, size)
        return lax.dynamic_update_slice_in_dim(out, jnp.where(in_block[:, None], product, kept), start, 0)

    out = vary_like(jnp.zeros((count, weights.shape[2]), rows.dtype), rows, weights, group_sizes)
    return lax.fori_loop(0, block_end[-1], step, out)
