"""Rows in FP8: activations that are quantized as they come, with a scale for each row's 128 columns.

It is the recipe that DeepSeek-V3 was trained with (arXiv:2412.19437, section 3.3.2; `act_quant` in its inference/kernel.py).
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, UInt8

from jax_mla_cp.model.fp8 import fp8_bytes

COLUMNS = 128
"""Columns that share a scale."""
_LARGEST = 448.0  # of float8_e4m3fn
_LEAST = 1e-30  # the scale of columns that are all 0 must not be 0


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ScaledRows:
    """Rows in FP8: `grouped_matmul` takes them in the place of an array [M, K], with matrices in FP8."""

    q: UInt8[Array, "M K"]
    """The bytes of float8_e4m3fn."""
    scale: Float[Array, "M ceil(K/128)"]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.q.shape


Rows = Float[Array, "M K"] | ScaledRows
"""Rows, plain or in FP8."""


def quantize_rows(x: Float[Array, "M K"]) -> ScaledRows:
    """Rounds each number to one of e4m3's times the scale with which its columns' largest is 448.

    The largest error is 1/16 of a number, or 2^-10 of a scale: e4m3 has three bits behind the first one, and its smallest number is 2^-9.
    """
    wide = _by_columns(x.astype(jnp.float32))
    largest = jnp.maximum(jnp.abs(wide).max(-1, keepdims=True), _LEAST)
    q = fp8_bytes(wide * (_LARGEST / largest))
    return ScaledRows(q.reshape(len(x), -1)[:, : x.shape[1]], largest[..., 0] / _LARGEST)


def dequantize_rows(rows: ScaledRows) -> Float[Array, "M K"]:
    """`q * scale`, in float32."""
    wide = _by_columns(lax.bitcast_convert_type(rows.q, jnp.float8_e4m3fn).astype(jnp.float32))
    return (wide * rows.scale[..., None]).reshape(len(wide), -1)[:, : rows.shape[1]]


def _by_columns(x: Float[Array, "M K"]) -> Float[Array, "M ceil(K/128) 128"]:
    m, k = x.shape
    return jnp.pad(x, ((0, 0), (0, -k % COLUMNS))).reshape(m, -1, COLUMNS)
