"""The grouped product at the speed of reading the matrices once: ffi/few_rows/, for Hopper GPUs.

The kernel takes FP8 matrices as they are. It reads four neighboring bytes of a matrix at a time, and two of the four make one
operand of the tensor cores, so rows come with their columns in that order: see `interleave`.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int32

from jax_mla_cp import extension
from jax_mla_cp.model.fp8 import Matrices, ScaledMatrices

_MAX_GROUPS = 512  # ffi/few_rows.h
# Rows up to which the kernel is the fastest way, of one group and of the mean of several: measured on an H100 (docs/benchmarks.md).
_MAX_ROWS_FP8_ALONE = 256
_MAX_ROWS_FP8 = 512
_MAX_ROWS_ALONE = 64
_MAX_ROWS = 32


def fits(weights: Matrices, groups: int) -> bool:
    """True if the kernel takes these matrices."""
    _, n, k = weights.shape
    if weights.dtype != jnp.bfloat16 or k % 64 or n % 8 or groups > _MAX_GROUPS:
        return False
    if not isinstance(weights, ScaledMatrices):
        return True
    outputs, inputs = weights.block
    in_blocks = inputs == 128 and outputs % 64 == 0 and weights.scale.dtype == jnp.float32
    in_groups = weights.block == (1, 32) and k % 128 == 0 and weights.scale.dtype == jnp.bfloat16
    return in_blocks or in_groups


def is_fastest(weights: Matrices, expected_rows: int, groups: int) -> bool:
    """True if no other way is as fast for about `expected_rows` rows in all groups."""
    most = _MAX_ROWS_ALONE if groups == 1 else _MAX_ROWS
    if isinstance(weights, ScaledMatrices):
        most = _MAX_ROWS_FP8_ALONE if groups == 1 else _MAX_ROWS_FP8
    return fits(weights, groups) and expected_rows <= most * groups


def few_rows_matmul(
    rows: Float[Array, "M K"],
    weights: Matrices,
    group_sizes: Int32[Array, " E"],
    first: Int32[Array, ""] | int,
    expected_rows: int,
) -> Float[Array, "M N"]:
    """As `grouped_matmul`, for operands that fit. Rows past all groups are not written.

    Each matrix that has rows is read once for each tile of them, of 8 to 128 rows. A block's scale is applied to the float32 sum of
    its inputs, so that no `q * scale` is rounded; but a 4-bit weight, which has one for 32 inputs, is, as by `dequantize`. A row's
    result does not depend on the other rows.

    Args:
      expected_rows: about as many as all groups have. It chooses the tile: the speed, and the order of float32 sums.

    Raises:
      XlaRuntimeError: when it runs, if shapes or dtypes don't fit; names the argument, expected and got.
    """
    operands = [weights] if not isinstance(weights, ScaledMatrices) else [weights.q, weights.scale]
    sizes: dict[str, Any] = {"max_rows": np.int64(_tile_rows(expected_rows, len(group_sizes)))}
    target = "few_rows"
    if isinstance(weights, ScaledMatrices):
        target, rows = "few_rows_scaled", interleave(rows)
        sizes |= {"block_outputs": np.int64(weights.block[0]), "block_inputs": np.int64(weights.block[1])}
    result = jax.ShapeDtypeStruct((rows.shape[0], weights.shape[1]), jnp.bfloat16)
    out: jax.Array = extension.call(
        target, result, rows, *operands, group_sizes, extension.index_operand(first), **sizes
    )
    return out


def interleave(rows: Float[Array, "M K"]) -> Float[Array, "M K"]:
    """Reorders each 16 columns: place 8h + 2c + e gets column 4c + 2e + h, for h, e < 2 and c < 4.

    In a wgmma fragment a thread has the inputs 2c, 2c + 1, 2c + 8 and 2c + 9 (PTX ISA, wgmma's register fragments). The kernel gives
    them bytes 4c, 4c + 2, 4c + 1 and 4c + 3 of the matrix: one load, and the two halves of a word widen together.
    """
    m, k = rows.shape
    return rows.reshape(m, k // 16, 4, 2, 2).transpose(0, 1, 4, 2, 3).reshape(m, k)


def _tile_rows(expected: int, groups: int) -> int:
    """The rows of a tile. Groups with more rows read their matrix again, mostly from the GPU's cache."""
    if groups == 1:
        return expected
    mean = -(-expected // groups)
    return 8 if expected <= 8 else 32 if mean <= 16 else 128
