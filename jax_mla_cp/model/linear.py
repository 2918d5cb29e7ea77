"""`linear`: the product with a dense matrix, whether it is plain or in FP8."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int32

from jax_mla_cp.model.fp8 import Fp8
from jax_mla_cp.model.grouped_matmul import GroupedMatmul, grouped_matmul


def linear(
    x: Float[Array, "T K"],
    weight: nnx.Param[Any] | Fp8,
    layer: Int32[Array, ""] | int,
    implementation: GroupedMatmul,
) -> Float[Array, "T N"]:
    """`x @ W.T`, of a layer's matrix [N, K], or [2, F, K] of `2 F` outputs.

    Args:
      weight: the layer's own, or in FP8 those of the whole stack (see `ParamFactory`).
      layer: the layer's index in the stack.
      implementation: as in `grouped_matmul`, of a product with FP8.
    """
    if isinstance(weight, Fp8):
        return grouped_matmul(x, weight.matrices(), None, layer, implementation=implementation)
    return jnp.einsum("tk,nk->tn", x, weight[...].reshape(-1, x.shape[1]))
