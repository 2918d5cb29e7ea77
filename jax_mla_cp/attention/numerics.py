"""Products of narrow numbers, summed in float32."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax


def einsum_float32(subscripts: str, a: jax.Array, b: jax.Array) -> jax.Array:
    """`jnp.einsum` with a float32 result, whatever the operands' dtype.

    XLA:CPU can't run every bfloat16 product with a float32 result, so a program for CPUs widens the operands first: the
    same numbers, since the product of two bfloat16 is exact in float32.
    """

    def widened(a: jax.Array, b: jax.Array) -> jax.Array:
        return jnp.einsum(subscripts, a.astype(jnp.float32), b.astype(jnp.float32))

    def narrow(a: jax.Array, b: jax.Array) -> jax.Array:
        return jnp.einsum(subscripts, a, b, preferred_element_type=jnp.float32)

    # Chosen when the program is lowered for a platform, which keeps this branch alone.
    out: jax.Array = lax.platform_dependent(a, b, cpu=widened, default=narrow)
    return out
