"""The largest values of each row, found without sorting it: largest first, the first of equal ones first.

XLA's sort of a vocabulary on a GPU is a custom call that no CUDA graph can record. What surrounds it can't be recorded either,
and a conditional that isn't recorded makes the host wait for its predicate, in every step.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int32, UInt32

from jax_mla_cp.mesh import vary_like

_GROUP = 16
"""Values that `_top_k_of_groups` knows the maximum of."""
_RANKED = 512
"""Values of a row that it compares each with each, at most."""
_DIGIT = 4
"""Bits of a threshold that `_threshold` finds in a pass over the rows, with a sum for each of their values but 0."""
_SUMMED = 256
"""Weights that are summed one after the other, at most, before such sums are."""
_SIGN = np.uint32(1 << 31)


def top_k(values: Float[Array, "J V"], k: int) -> tuple[Float[Array, "J k"], Int32[Array, "J k"]]:
    """`lax.top_k`, which on CPUs does not sort. At most 32 of a row."""
    return lax.platform_dependent(
        values, cpu=lambda x: tuple(lax.top_k(x, k)), default=lambda x: _top_k_of_groups(x, k)
    )


def leading(values: Float[Array, "J V"], weights: Float[Array, "J V"], limit: Float[Array, " J"]) -> Bool[Array, "J V"]:
    """Mask of the fewest values, from the largest on, whose weights sum to `limit` or more; of all if no number of them does.

    The sums' order depends on the shapes alone. It is not the values' order, so weights that reach the limit by less than
    the rounding of float32 may fall short of it. Sums of ones are exact.

    Args:
      limit: positive.
    """
    size = values.shape[1]
    bits = _ordered_bits(values)
    border = _threshold(bits, weights, limit, 32)[:, None]
    tied = size - lax.broadcasted_iota(jnp.uint32, values.shape, 1)
    order = jnp.where(bits > border, size + 1, jnp.where(bits == border, tied, 0)).astype(jnp.uint32)
    last = _threshold(order, weights, limit, (size + 1).bit_length())
    return order >= jnp.maximum(last, 1)[:, None]


def _threshold(
    keys: UInt32[Array, "J V"], weights: Float[Array, "J V"], limit: Float[Array, " J"], width: int
) -> UInt32[Array, " J"]:
    """The largest number such that the weights of keys not below it sum to `limit` or more; 0 if there is none.

    Found digit by digit, the highest first. Masked sums in one order fall as the threshold rises, rounded ones too.

    Args:
      width: bits that keys have.
    """
    passes = -(-width // _DIGIT)
    digits = jnp.arange(1, 1 << _DIGIT, dtype=jnp.uint32)
    keys, weights = (
        jnp.pad(x, ((0, 0), (0, -x.shape[1] % _SUMMED))).reshape(len(x), -1, _SUMMED) for x in (keys, weights)
    )

    def find_digit(i: jax.Array | int, found: jax.Array) -> jax.Array:
        shift = jnp.uint32(_DIGIT) * jnp.asarray(passes - 1 - i, jnp.uint32)
        reached = _sums_from(keys, weights, found[:, None] + (digits << shift)) >= limit[:, None]
        return found + (reached.sum(1, dtype=jnp.uint32) << shift)

    # A loop compiles faster, but a CUDA graph has none.
    return lax.platform_dependent(
        vary_like(jnp.zeros(limit.shape, jnp.uint32), keys, weights, limit),
        cpu=lambda found: lax.fori_loop(0, passes, find_digit, found),
        default=lambda found: lax.fori_loop(0, passes, find_digit, found, unroll=True),
    )


def _sums_from(
    keys: UInt32[Array, "J m s"], weights: Float[Array, "J m s"], thresholds: UInt32[Array, "J n"]
) -> Float[Array, "J n"]:
    """Sums of a row's weights of keys not below each threshold. One reduction with n results, so that keys are read once."""
    n = thresholds.shape[1]
    masked = [jnp.where(keys >= thresholds[:, i, None, None], weights, 0.0) for i in range(n)]
    sums = lax.reduce(masked, [jnp.float32(0)] * n, lambda a, b: [x + y for x, y in zip(a, b, strict=True)], (2,))
    return jnp.stack(sums, axis=1).sum(2)


def _top_k_of_groups(values: Float[Array, "J V"], k: int) -> tuple[Float[Array, "J k"], Int32[Array, "J k"]]:
    # Behind a barrier: XLA may otherwise compute the values again where it gathers them, in another order.
    bits, index = _largest(lax.optimization_barrier(_ordered_bits(values)), k)
    return _from_ordered_bits(bits), index


def _largest(bits: UInt32[Array, "J n"], k: int) -> tuple[UInt32[Array, "J k"], Int32[Array, "J k"]]:
    """The k largest and their indices.

    Among groups of neighbors in the order of their maxima, no group behind the first k has any of the k largest: each of the
    k has a value that comes before all of its own.
    """
    rows, n = bits.shape
    if n <= _RANKED:
        return _ranked(bits, lax.broadcasted_iota(jnp.int32, bits.shape, 1), k)
    bits = jnp.pad(bits, ((0, 0), (0, -n % _GROUP))).reshape(rows, -1, _GROUP)
    _, group = _largest(bits.max(2), k)
    index = group[:, :, None] * _GROUP + jnp.arange(_GROUP, dtype=jnp.int32)
    bits = jnp.take_along_axis(bits, group[:, :, None], axis=1)
    return _ranked(bits.reshape(rows, -1), index.reshape(rows, -1), k)


def _ranked(
    bits: UInt32[Array, "J n"], index: Int32[Array, "J n"], k: int
) -> tuple[UInt32[Array, "J k"], Int32[Array, "J k"]]:
    """The k largest and their `index`, the smaller index first of equal ones. A value's rank is the number of those before it."""
    mine, other = bits[:, :, None], bits[:, None]
    before = (other > mine) | ((other == mine) & (index[:, None] < index[:, :, None]))
    rank = before.sum(2, dtype=jnp.int32)
    chosen = rank[:, None] == jnp.arange(k, dtype=jnp.int32)[:, None]
    return jnp.where(chosen, bits[:, None], 0).max(2), jnp.where(chosen, index[:, None], 0).max(2)


def _ordered_bits(values: Float[Array, "*n"]) -> UInt32[Array, "*n"]:
    """Numbers in the order of `lax.top_k`: -NaN, -inf, ..., -0, 0, ..., inf, NaN."""
    bits = lax.bitcast_convert_type(values, jnp.uint32)
    return jnp.where(bits >> 31 == 1, ~bits, bits | _SIGN)


def _from_ordered_bits(bits: UInt32[Array, "*n"]) -> Float[Array, "*n"]:
    return lax.bitcast_convert_type(jnp.where(bits >> 31 == 1, bits ^ _SIGN, ~bits), jnp.float32)
