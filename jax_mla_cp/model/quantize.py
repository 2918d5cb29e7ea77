"""Activations to FP8: by kernels of our own on Hopper GPUs (ffi/quantize.cu), which read their input once; XLA reads it twice."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jax_mla_cp import extension
from jax_mla_cp.mesh import vary_like
from jax_mla_cp.model.fp8_rows import COLUMNS, ScaledRows, quantize_rows
from jax_mla_cp.model.grouped_matmul import GroupedMatmul


def quantize(x: Float[Array, "M K"], implementation: GroupedMatmul) -> ScaledRows:
    """`quantize_rows`.

    Args:
      implementation: that of the product: "hopper" takes the kernel, for bfloat16.
    """
    if not _by_kernel(x, x.shape[1], implementation):
        return quantize_rows(x)
    return _call("quantize_rows", x.shape[1], x)


def quantize_gated(
    gate_up: Float[Array, "M 2F"], weight: Float[Array, " M"], implementation: GroupedMatmul
) -> ScaledRows:
    """Quantizes `silu(gate) * up`, each row times its weight, in float32."""
    width = gate_up.shape[1] // 2
    if not _by_kernel(gate_up, width, implementation):
        gate, up = jnp.split(gate_up.astype(jnp.float32), 2, axis=-1)
        return quantize_rows(jax.nn.silu(gate) * up * weight[:, None])
    return _call("quantize_gated", width, gate_up, weight)


def _by_kernel(x: jax.Array, columns: int, implementation: GroupedMatmul) -> bool:
    return implementation == "hopper" and x.dtype == jnp.bfloat16 and columns % 8 == 0


def _call(target: str, columns: int, *operands: jax.Array) -> ScaledRows:
    extension.load()
    m = len(operands[0])
    results = (
        jax.ShapeDtypeStruct((m, columns), jnp.uint8),
        jax.ShapeDtypeStruct((m, -(-columns // COLUMNS)), jnp.float32),
    )
    out = ScaledRows(*jax.ffi.ffi_call(target, results)(*operands))
    return vary_like(out, operands)  # a custom call's own type says "equal on all devices"
