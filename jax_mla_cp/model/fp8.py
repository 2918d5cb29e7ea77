"""Matrices that stay in FP8 in device memory, and their dequantization.

A matrix lies as every other one does, K-major: [N outputs, K inputs]. Its scales are [ceil(N / bn), ceil(K / bk)], one for each
block of bn outputs and bk inputs; `fp8_blocks` says which matrices can be kept so.

Arrays hold the bytes of float8_e4m3fn as uint8: before XLA:CPU slices a float8 array, or updates it in place, it makes a
float16 copy of the whole stack of layers.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jaxtyping import Array, Float, Int32, UInt8


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ScaledMatrices:
    """Matrices in FP8, [N outputs, K inputs] each: `grouped_matmul` takes them in the place of an array [G, N, K]."""

    q: UInt8[Array, "G N K"]
    """The bytes of float8_e4m3fn."""
    scale: Float[Array, "G N/bn K/bk"]
    """Rounded up: the last block of a matrix may be smaller."""
    block: tuple[int, int] = dataclasses.field(metadata={"static": True})
    """Outputs and inputs that share a scale."""
    dtype: np.dtype[Any] = dataclasses.field(metadata={"static": True})
    """The model's, to which they are dequantized."""

    @property
    def shape(self) -> tuple[int, ...]:
        return self.q.shape


Matrices = Float[Array, "G N K"] | ScaledMatrices
"""Matrices of one shape, plain or in FP8."""


def take_matrices(matrices: Matrices, first: Int32[Array, ""] | int, count: int) -> Float[Array, "E N K"]:
    """A copy of `count` matrices, from number `first` on, dequantized if they are in FP8."""
    if not isinstance(matrices, ScaledMatrices):
        return lax.dynamic_slice_in_dim(matrices, first, count)
    q, scale = (lax.dynamic_slice_in_dim(x, first, count) for x in (matrices.q, matrices.scale))
    return dequantize(q, scale, matrices.block, matrices.dtype)


def take_matrix(matrices: Matrices, index: Int32[Array, ""] | int) -> Float[Array, "N K"]:
    """A copy of one matrix, dequantized if it is in FP8."""
    return take_matrices(matrices, index, 1)[0]


class Fp8(nnx.Module):
    """The parameters of one or more matrices in FP8: [.., N, K], or [.., 2, F, K] of `2 F` outputs."""

    def __init__(
        self,
        q: nnx.Param[Any],
        scale: nnx.Param[Any],
        block: tuple[int, int],
        dtype: np.dtype[Any],
        dims: int,
    ):
        """`dims`: the dimensions of a matrix; the others are of layers and experts."""
        self.q = q
        self.scale = scale
        self.block = block
        self.dtype = dtype
        self.dims = dims

    def matrices(self) -> ScaledMatrices:
        """All of them, of every layer and expert: a view."""
        q, scale = (stack_matrices(p[...], self.dims) for p in (self.q, self.scale))
        return ScaledMatrices(q, scale, self.block, self.dtype)


def matrices_of(weight: nnx.Param[Any] | Fp8) -> Matrices:
    """All matrices of a parameter of `ParamFactory.matrix`, of every layer and expert: a view."""
    return weight.matrices() if isinstance(weight, Fp8) else stack_matrices(weight[...], weight.get_metadata("dims"))


def stack_matrices(x: jax.Array, dims: int) -> Float[Array, "G N K"]:
    """A view of [.., N, K] with `dims` 2, or of [.., 2, F, K] with 3: the leading dimensions are one, and the outputs are one."""
    return x.reshape(-1, math.prod(x.shape[-dims:-1]), x.shape[-1])


def dequantize(q: jax.Array, scale: jax.Array, block: tuple[int, int], dtype: np.dtype[Any]) -> jax.Array:
    """`q * scale` in float32, rounded once to `dtype`.

    Args:
      q: float8_e4m3fn's bytes, uint8 [.., N, K].
      scale: [.., ceil(N / bn), ceil(K / bk)].
      block: (bn, bk).
    """
    for dim, size in zip((-2, -1), block, strict=True):
        if size > 1:
            dim += q.ndim
            scale = lax.slice_in_dim(jnp.repeat(scale, size, axis=dim), 0, q.shape[dim], axis=dim)
    wide = lax.bitcast_convert_type(q, jnp.float8_e4m3fn).astype(jnp.float32)
    return (wide * scale.astype(jnp.float32)).astype(dtype)


def fp8_bytes(x: jax.Array) -> jax.Array:
    """The bytes of x in float8_e4m3fn, as uint8. Whole numbers from -16 to 16 are exact."""
    return lax.bitcast_convert_type(x.astype(jnp.float8_e4m3fn), jnp.uint8)


def unpack_int4(packed: jax.Array) -> jax.Array:
    """Unpacks eight numbers from -8 to 7 of each int32, lowest bits first, along the last dimension, to int8.

    The offset of 8 is that of compressed-tensors' `pack_to_int32`.
    """
    nibble = jnp.arange(8, dtype=jnp.int32)
    values = ((packed[..., None] >> 4 * nibble) & 15) - 8
    return lax.collapse(values.astype(jnp.int8), packed.ndim - 1)
