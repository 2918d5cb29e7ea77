"""Random arrays, made on the device: kernels run faster on zeros than on real numbers."""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax

from jax_mla_cp.model.fp8 import fp8_bytes

_BLOCK = 1 << 26  # elements at a time, which bounds the float32 intermediates


def fill(out: jax.Array, key: jax.Array, scale: float = 1.0) -> jax.Array:
    """Fills `out` with N(0, scale^2), a block of rows at a time. Traceable; donate `out` to keep a single copy.

    uint8 stands for float8_e4m3fn, as in model/fp8.py.
    """
    rows, width = math.prod(out.shape[:-1]), out.shape[-1]
    block = max(1, min(rows, _BLOCK // width))

    def step(i: jax.Array, flat: jax.Array) -> jax.Array:
        part = jax.random.normal(jax.random.fold_in(key, i), (block, width), jnp.float32) * scale
        at = jnp.minimum(i * block, rows - block)  # the last block is moved back into the array
        cast = fp8_bytes(jnp.clip(part, -448, 448)) if out.dtype == jnp.uint8 else part.astype(out.dtype)
        return lax.dynamic_update_slice_in_dim(flat, cast, at, 0)

    return lax.fori_loop(0, -(-rows // block), step, out.reshape(rows, width)).reshape(out.shape)


@functools.partial(jax.jit, static_argnums=2, donate_argnums=0)
def _fill(out: jax.Array, seed: int, scale: float) -> jax.Array:
    return fill(out, jax.random.key(seed), scale)


def normal(
    seed: int, shape: tuple[int, ...], dtype: jax.typing.DTypeLike = jnp.bfloat16, scale: float = 1.0
) -> jax.Array:
    """Returns an array of N(0, scale^2) on the default device."""
    return _fill(jnp.zeros(shape, dtype), seed, scale)
