"""Matrices that stay in FP8 in device memory, and their dequantization.

A matrix has the layout of an unquantized one: [inputs, ...outputs], with layers and experts in front. Its scales have the
same dimensions: one scale per block along some, and one per element along those where heads, halves or devices would cut
blocks. So the mesh divides the scales as it divides the matrix.

Arrays hold the bytes of float8_e4m3fn as uint8: before XLA:CPU slices a float8 array, or updates it in place, it makes a
float16 copy of the whole stack of layers.
"""

from __future__ import annotations

from types import EllipsisType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax


class Fp8(nnx.Module):
    """A matrix in FP8. `[...]` dequantizes it to the model's dtype, so that it is read as an `nnx.Param` is."""

    def __init__(self, q: nnx.Param[Any], scale: nnx.Param[Any], blocks: tuple[int, ...], dtype: np.dtype[Any]):
        """`blocks`: elements that share a scale, along each of a layer's own dimensions."""
        self.q = q
        self.scale = scale
        self.blocks = blocks
        self.dtype = dtype

    def __getitem__(self, everything: EllipsisType) -> jax.Array:
        return dequantize(self.q[...], self.scale[...], self.blocks, self.dtype)

    def experts(self, first: jax.Array | int, count: int) -> jax.Array:
        """Dequantizes the matrices of `count` experts, from number `first` of all layers' experts on: [count, inputs, outputs]."""
        q, scale = (lax.dynamic_slice_in_dim(lax.collapse(p[...], 0, -2), first, count) for p in (self.q, self.scale))
        return dequantize(q, scale, self.blocks, self.dtype)


def dequantize(q: jax.Array, scale: jax.Array, blocks: tuple[int, ...], dtype: np.dtype[Any]) -> jax.Array:
    """`q * scale` in float32, rounded once to `dtype`.

    Args:
      q: float8_e4m3fn's bytes, uint8.
      scale: of q's rank; along dimension d, `ceil(q.shape[d] / blocks[d])` of them.
      blocks: elements that share a scale, along each dimension.
    """
    for dim, (size, block) in enumerate(zip(q.shape, blocks, strict=True)):
        if block > 1:
            scale = lax.slice_in_dim(jnp.repeat(scale, block, axis=dim), 0, size, axis=dim)
    wide = lax.bitcast_convert_type(q, jnp.float8_e4m3fn).astype(jnp.float32)
    return (wide * scale.astype(jnp.float32)).astype(dtype)


def fp8_bytes(x: jax.Array) -> jax.Array:
    """The bytes of x in float8_e4m3fn, as uint8. Whole numbers from -16 to 16 are exact."""
    return lax.bitcast_convert_type(x.astype(jnp.float8_e4m3fn), jnp.uint8)


def unpack_int4(packed: jax.Array, dim: int) -> jax.Array:
    """Unpacks eight numbers from -8 to 7 of each int32, lowest bits first, along `dim`, to int8.

    The offset of 8 is that of compressed-tensors' `pack_to_int32`.
    """
    shape = (*packed.shape[: dim + 1], 8, *packed.shape[dim + 1 :])
    nibble = lax.broadcasted_iota(jnp.int32, shape, dim + 1)
    values = ((jnp.expand_dims(packed, dim + 1) >> 4 * nibble) & 15) - 8
    return lax.collapse(values.astype(jnp.int8), dim, dim + 2)
