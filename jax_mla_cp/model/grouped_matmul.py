"""`grouped_matmul`: rows sorted by group, each times its group's matrix."""

from __future__ import annotations

import dataclasses
from types import ModuleType
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int32

from jax_mla_cp import extension
from jax_mla_cp.mesh import vary_like
from jax_mla_cp.model.few_rows import few_rows_matmul, is_fastest
from jax_mla_cp.model.fp8 import Matrices, ScaledMatrices, take_matrices, take_matrix
from jax_mla_cp.model.fp8_rows import Rows, ScaledRows, dequantize_rows
from jax_mla_cp.model.w8a8 import w8a8_matmul

GroupedMatmul = Literal["hopper", "pallas", "blocks", "ragged"]
"""Implementations of `grouped_matmul`."""

_LARGEST_BLOCK = 128


def resolve_grouped_matmul() -> GroupedMatmul:
    """Returns the fastest implementation for this process's devices."""
    device = jax.devices()[0]
    if device.platform == "cpu":
        return "blocks"
    if device.platform != "gpu" or device.compute_capability != "9.0":
        return "ragged"
    return "hopper" if extension.cuda_problem() is None else "pallas"


def has_kernels(implementation: GroupedMatmul) -> bool:
    """True if the extension's CUDA kernels run here, those for products and the others."""
    return implementation == "hopper"


def grouped_matmul(
    rows: Rows,
    weights: Matrices,
    group_sizes: Int32[Array, " E"] | None,
    first: Int32[Array, ""] | int = 0,
    *,
    implementation: GroupedMatmul,
    expected_rows: int | None = None,
) -> Float[Array, "M N"]:
    """Multiplies rows `[sum(group_sizes[:e]), sum(group_sizes[:e + 1]))` by `weights[first + e].T`.

    Rows past all groups are undefined: on Hopper they are memory that nobody wrote, NaN included. Select the rows that
    exist, don't multiply the others by 0.

    Args:
      rows: those in FP8 are multiplied by matrices in FP8 that `w8a8.fits`, with the result in the matrices' `dtype`: "hopper" by a
        kernel of their own (`w8a8.py`), the others in float32.
      group_sizes: None: all rows are of one group.
      implementation: "hopper": for few rows a kernel that reads each matrix once, in FP8 as it is (`few_rows.py`); for more rows
        a Pallas kernel (`many_rows.py`). Both are for bfloat16 and for sizes that their tiles divide; other operands run as in
        "ragged". "pallas": the second one alone, without the extension. "blocks", for CPUs: a loop over blocks of rows of one
        group each, with a dynamic trip count (XLA:CPU's `ragged_dot` multiplies every row by every group's matrix).
        "ragged": `lax.ragged_dot`, and for a single group a plain product of all rows. Matrices in FP8 are dequantized
        first, unless `multiplies_fp8`.
      expected_rows: about as many rows as all groups have; None: all of `rows`. "hopper" chooses by it.
    """
    if isinstance(rows, ScaledRows):
        assert isinstance(weights, ScaledMatrices), "rows in FP8 are multiplied by matrices in FP8"
        return _w8a8(rows, weights, group_sizes, first, implementation)
    groups = 1 if group_sizes is None else len(group_sizes)
    expected_rows = rows.shape[0] if expected_rows is None else expected_rows
    if rows.dtype == weights.dtype and _are_few(weights, expected_rows, groups, implementation):
        return few_rows_matmul(rows, weights, _sizes(rows, group_sizes), first, expected_rows)
    if group_sizes is None:
        return _multiply(rows, take_matrix(weights, first))
    if implementation == "blocks":
        return _blocks(rows, weights, group_sizes, first)
    if isinstance(weights, ScaledMatrices):
        weights, first = take_matrices(weights, first, groups), 0
    if implementation != "ragged" and _many_rows().fits(rows, weights):
        return _many_rows().many_rows_matmul(rows, weights, group_sizes, first)
    if groups == 1:
        return _multiply(rows, take_matrix(weights, first))
    return _ragged(rows, take_matrices(weights, first, groups), group_sizes)


def multiplies_fp8(weights: ScaledMatrices, expected_rows: int, groups: int, implementation: GroupedMatmul) -> bool:
    """True if `grouped_matmul` multiplies with matrices in FP8 as they are; else it dequantizes those of all `groups` first.

    A caller that multiplies with the same matrices again and again may then dequantize them once.
    """
    return implementation == "blocks" or _are_few(weights, expected_rows, groups, implementation)


def group_alignment(weights: Matrices, rows: int, groups: int, implementation: GroupedMatmul) -> int:
    """Returns the number of rows that groups should begin at multiples of, when `rows` rows are in all groups.

    The Pallas kernel computes a tile with rows of two groups twice. With few rows per group, padding would cost more.
    """
    if implementation in ("blocks", "ragged") or _are_few(weights, rows, groups, implementation):
        return 1
    tile: int = _many_rows().TILE
    return tile if rows >= groups * tile else 1


def _are_few(weights: Matrices, expected_rows: int, groups: int, implementation: GroupedMatmul) -> bool:
    """True if the kernel for few rows multiplies them."""
    return implementation == "hopper" and is_fastest(weights, expected_rows, groups)


def _w8a8(
    rows: ScaledRows,
    weights: ScaledMatrices,
    group_sizes: jax.Array | None,
    first: jax.Array | int,
    implementation: GroupedMatmul,
) -> Float[Array, "M N"]:
    if implementation == "hopper" and weights.dtype == jnp.bfloat16:
        return w8a8_matmul(rows, weights, _sizes(rows, group_sizes), first)
    wide = dataclasses.replace(weights, dtype=np.dtype(np.float32))
    out = grouped_matmul(dequantize_rows(rows), wide, group_sizes, first, implementation=implementation)
    return out.astype(weights.dtype)


def _sizes(rows: Rows, group_sizes: jax.Array | None) -> Int32[Array, " E"]:
    return jnp.full(1, rows.shape[0], jnp.int32) if group_sizes is None else group_sizes


def _many_rows() -> ModuleType:
    """The Pallas kernel's module. It is imported only where it runs, because Pallas for GPUs is experimental."""
    from jax_mla_cp.model import many_rows

    return many_rows


def _multiply(rows: Float[Array, "M K"], matrix: Float[Array, "N K"]) -> Float[Array, "M N"]:
    # Float32 in full: the keys' roped part passes through this product (model/mla.py), and TF32 would round it.
    precision = lax.Precision.HIGHEST if rows.dtype == jnp.float32 else None
    return jnp.einsum("mk,nk->mn", rows, matrix, precision=precision)


def _ragged(
    rows: Float[Array, "M K"], weights: Float[Array, "E N K"], group_sizes: Int32[Array, " E"]
) -> Float[Array, "M N"]:
    numbers = lax.RaggedDotDimensionNumbers(
        dot_dimension_numbers=(((1,), (2,)), ((), ())), lhs_ragged_dimensions=[0], rhs_group_dimensions=[0]
    )
    return lax.ragged_dot_general(rows, weights, group_sizes, numbers)


def _blocks(
    rows: jax.Array, weights: jax.Array | ScaledMatrices, group_sizes: jax.Array, first_group: jax.Array | int
) -> jax.Array:
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
        product = _multiply(lax.dynamic_slice_in_dim(rows, start, size), take_matrix(weights, first_group + group))
        kept = lax.dynamic_slice_in_dim(out, start, size)
        return lax.dynamic_update_slice_in_dim(out, jnp.where(in_block[:, None], product, kept), start, 0)

    out = vary_like(jnp.zeros((count, weights.shape[1]), rows.dtype), rows, weights, group_sizes)
    return lax.fori_loop(0, block_end[-1], step, out)
