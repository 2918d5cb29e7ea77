"""The grouped product of rows and matrices that are both in FP8: ffi/w8a8/, for Hopper GPUs."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from jax_mla_cp import extension
from jax_mla_cp.config.quantization import Fp8Compute
from jax_mla_cp.model.fp8 import Matrices, ScaledMatrices
from jax_mla_cp.model.fp8_rows import COLUMNS, ScaledRows

# Rows up to which activations stay as they are, of one group and of the mean of several: the few rows of a decode step, whose time is
# that of reading the matrices (docs/benchmarks.md). A dense matrix has as many rows as the step has tokens, 128 in a decode bucket.
_FEW_ROWS_ALONE = 128
_FEW_ROWS = 32


def quantizes_rows(weights: Matrices, expected_rows: int, groups: int, compute: Fp8Compute) -> bool:
    """True if about `expected_rows` rows in all groups are to be multiplied in FP8.

    It depends on the sizes alone, not on the device, so that a program computes the same everywhere.
    """
    return (
        compute == "w8a8" and fits(weights) and expected_rows > (_FEW_ROWS_ALONE if groups == 1 else _FEW_ROWS * groups)
    )


def fits(weights: Matrices) -> bool:
    """True if matrices can be multiplied by rows in FP8: those with a float32 scale for blocks of 128 x 128."""
    _, n, k = weights.shape
    if not isinstance(weights, ScaledMatrices) or weights.scale.dtype != jnp.float32:
        return False
    return weights.block == (COLUMNS, COLUMNS) and not k % 16 and not n % 8


def w8a8_matmul(
    rows: ScaledRows, weights: ScaledMatrices, group_sizes: Int32[Array, " E"], first: Int32[Array, ""] | int
) -> Float[Array, "M N"]:
    """As `grouped_matmul`, for matrices that fit, in bfloat16. Rows past all groups are not written.

    The sum of each 128 inputs is multiplied by both scales and added in float32. A row's result does not depend on the other
    rows.

    Raises:
      XlaRuntimeError: when it runs, if shapes or dtypes don't fit; names the argument, expected and got.
    """
    operands = rows.q, rows.scale.T, weights.q, weights.scale, group_sizes, extension.index_operand(first)
    result = jax.ShapeDtypeStruct((rows.shape[0], weights.shape[1]), jnp.bfloat16)
    out: jax.Array = extension.call("w8a8", result, *operands)
    return out
