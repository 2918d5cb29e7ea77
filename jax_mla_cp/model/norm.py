"""RMS norm, and with it the sum that it normalizes."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int32

from jax_mla_cp import extension
from jax_mla_cp.mesh import vary_like
from jax_mla_cp.model.grouped_matmul import GroupedMatmul

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
    implementation: GroupedMatmul,
) -> tuple[Float[Array, "T D"], Float[Array, "T D"]]:
    """`x + part`, and its RMS norm with the weights of a layer of a stack.

    On Hopper GPUs it is one kernel that reads the weights where they are (ffi/norm/add_norm.cu); XLA copies the layer's slice first
    and makes two.

    Args:
      implementation: that of the products: "hopper" takes the kernel, for bfloat16.
    """
    columns = x.shape[1]
    if implementation == "hopper" and x.dtype == jnp.bfloat16 and columns % 8 == 0 and columns <= _MAX_COLUMNS:
        extension.load()
        results = (jax.ShapeDtypeStruct(x.shape, x.dtype),) * 2
        call = jax.ffi.ffi_call("add_norm", results, input_output_aliases={0: 0})
        operands = (x, part, weight, lax.convert_element_type(layer, jnp.int32).reshape(1))
        out = call(*operands, eps=np.float32(eps))
        total, normed = vary_like(out, operands)  # a custom call's own type says "equal on all devices"
        return total, normed
    x = x + part
    return x, rms_norm(x, weight[layer], eps)
