"""Products of narrow numbers, summed in float32."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def einsum_float32(subscripts: str, a: jax.Array, b: jax.Array) -> jax.Array:
    """`jnp.einsum` with a float32 result, whatever the operands' dtype.

    XLA:CPU can't run every bfloat16 product with a float32 result, so there the operands are widened first: the same
    numbers, since the product of two bfloat16 is exact in float32.
    """
    if jax.default_backend() == "cpu":
        a, b = a.astype(jnp.float32), b.astype(jnp.float32)
    return jnp.einsum(subscripts, a, b, preferred_element_type=jnp.float32)
