"""Activations to FP8: by kernels of our own on Hopper GPUs (ffi/quantize.cu), which read their input once; XLA reads it twice."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jax_mla_cp import extension
from jax_mla_cp.model.fp8_rows import COLUMNS, ScaledRows, quantize_rows


def quantize(x: Float[Array, "M K"], *, kernels: bool) -> ScaledRows:
    """`quantize_rows`.

    Args:
      kernels: as `Build.kernels`; the kernel is for bfloat16.
    """
    if not _fits(x, x.shape[1], kernels):
        return quantize_rows(x)
    return _call("quantize_rows", x.shape[1], x)


def quantize_gated(gate_up: Float[Array, "M 2F"], weight: Float[Array, " M"], *, kernels: bool) -> ScaledRows:
    """Quantizes `silu(gate) * up`, each row times its weight, in float32."""
    width = gate_up.shape[1] // 2
    if not _fits(gate_up, width, kernels):
        gate, up = jnp.split(gate_up.astype(jnp.float32), 2, axis=-1)
        return quantize_rows(jax.nn.silu(gate) * up * weight[:, None])
    return _call("quantize_gated", width, gate_up, weight)


def _fits(x: jax.Array, columns: int, kernels: bool) -> bool:
    return kernels and x.dtype == jnp.bfloat16 and columns % 8 == 0


def _call(target: str, columns: int, *operands: jax.Array) -> ScaledRows:
    m = len(operands[0])
    results = (
        jax.ShapeDtypeStruct((m, columns), jnp.uint8),
        jax.ShapeDtypeStruct((m, -(-columns // COLUMNS)), jnp.float32),
    )
    return ScaledRows(*extension.call(target, results, *operands))
