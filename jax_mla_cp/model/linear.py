"""`linear`: the product with a dense matrix, whether it is plain or in FP8."""

from __future__ import annotations

from typing import Any

from flax import nnx
from jaxtyping import Array, Float, Int32

from jax_mla_cp.model.build import Build
from jax_mla_cp.model.fp8 import Fp8, matrices_of
from jax_mla_cp.model.fp8_rows import Rows
from jax_mla_cp.model.grouped_matmul import grouped_matmul
from jax_mla_cp.model.quantize import quantize
from jax_mla_cp.model.w8a8 import quantizes_rows


def linear(
    x: Float[Array, "T K"],
    weight: nnx.Param[Any] | Fp8,
    layer: Int32[Array, ""] | int,
    build: Build,
) -> Float[Array, "T N"]:
    """`x @ W.T`, of a layer's matrix [N, K], or [2, F, K] of `2 F` outputs. Float32 is multiplied in full: no TF32.

    Args:
      weight: of the whole stack (see `ParamFactory`).
      layer: the layer's index in the stack.
    """
    matrices = matrices_of(weight)
    rows: Rows = x
    if quantizes_rows(matrices, len(x), 1, build.fp8_compute):
        rows = quantize(x, kernels=build.kernels)
    return grouped_matmul(rows, matrices, None, layer, implementation=build.grouped_matmul)
