"""RMS norm, and with it the sum that it normalizes."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int32

from jax_mla_cp import extension

_MAX_COLUMNS = 32768  # ffi/norm/add_norm.h


def rms_norm(x: Float[Array, "*T D"], weight: Float[Array, " D"], eps: float) -> Float[Array, "*T D"]:
    """RMS norm (arXiv:1910.07467), computed in float32, returned in x's dtype."""
    wide = x.astype(jnp.float32)
    wide = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + eps)
    return wide.astype(x.dtype) * weight


def add_norm(
    x: Float[Array, "T D"],
    part: Float[Array, "T D"],
    weight: Float[Array, "L D"],
    layer: Int32[Array, ""] | int,
    eps: float,
    *,
    kernels: bool,
) -> tuple[Float[Array, "T D"], Float[Array, "T D"]]:
    """`x + part`, and its RMS norm with the weights of a layer of a stack.

    On Hopper GPUs it is one kernel that reads the weights where they are (ffi/norm/add_norm.cu); XLA copies the layer's slice first
    and makes two.

    Args:
      kernels: as `Build.kernels`; the kernel is for bfloat16.
    """
    columns = x.shape[1]
    if kernels and x.dtype == jnp.bfloat16 and columns % 8 == 0 and columns <= _MAX_COLUMNS:
        results = (jax.ShapeDtypeStruct(x.shape, x.dtype),) * 2
        operands = x, part, weight, extension.index_operand(layer)
        total, normed = extension.call("add_norm", results, *operands, aliases={0: 0}, eps=np.float32(eps))
        return total, normed
    x = x + part
    return x, rms_norm(x, weight[layer], eps)
