"""The layout of (token, expert) pairs as rows, sorted by expert and then by token.

Few pairs, as in a decode step, are sorted by one kernel on Hopper GPUs (ffi/router/sort_pairs.cu), where XLA makes a dozen.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32, Shaped

from jax_mla_cp import extension

_FEW_PAIRS = 4096  # ffi/router/sort_pairs.h
_MAX_EXPERTS = 512  # ffi/shapes.h


@dataclasses.dataclass(frozen=True)
class RowLayout:
    """The rows of this device's pairs."""

    place: Int32[Array, "T k"]
    """Each pair's row; other devices' pairs get some past all rows."""
    sizes: Int32[Array, " E"]
    """Each expert's rows, a multiple of `align`."""
    token: Int32[Array, " R"]
    """Each row's token. All rows without a pair read token 0, which stays in the GPU's cache."""
    weight: Float[Array, " R"]
    """Each row's weight; 0 without a pair."""

    @property
    def end(self) -> Int32[Array, " E"]:
        """The end of each expert's rows."""
        return jnp.cumsum(self.sizes)


def lay_out(
    expert: Int32[Array, "T k"],
    weight: Float[Array, "T k"],
    num_experts: int,
    align: int,
    rows: int,
    *,
    kernels: bool,
) -> RowLayout:
    """Gives each pair with an `expert` in [0, num_experts) a row.

    Args:
      align: an expert's rows begin and end at multiples of it.
      rows: as many as all pairs take, whatever the routing, or more.
      kernels: as `Build.kernels`; the kernel is for few pairs.
    """
    if kernels and align == 1 and expert.size == rows <= _FEW_PAIRS and num_experts <= _MAX_EXPERTS:
        return _by_kernel(expert, weight, num_experts)
    expert = jnp.where((expert >= 0) & (expert < num_experts), expert, num_experts)  # other devices' pairs, at the end
    place, sizes = _sort(expert, num_experts, align, beyond=rows)
    pair_token = jnp.arange(expert.size, dtype=jnp.int32) // expert.shape[1]
    token, weight = (_scatter(x, place.reshape(-1), rows) for x in (pair_token, weight.reshape(-1)))
    return RowLayout(place, sizes, token, weight)


def _by_kernel(expert: Int32[Array, "T k"], weight: Float[Array, "T k"], num_experts: int) -> RowLayout:
    results = (
        jax.ShapeDtypeStruct(expert.shape, jnp.int32),
        jax.ShapeDtypeStruct((num_experts,), jnp.int32),
        jax.ShapeDtypeStruct((expert.size,), jnp.int32),
        jax.ShapeDtypeStruct((expert.size,), jnp.float32),
    )
    return RowLayout(*extension.call("sort_pairs", results, expert, weight))


def _scatter(values: Shaped[Array, " pairs"], row: Int32[Array, " pairs"], rows: int) -> Shaped[Array, " rows"]:
    return jnp.zeros(rows, values.dtype).at[row].set(values, mode="drop", unique_indices=True)


def _sort(
    expert: Int32[Array, "T k"], experts: int, align: int, beyond: int
) -> tuple[Int32[Array, "T k"], Int32[Array, " E"]]:
    """Returns each pair's row and the rows of each expert. Other devices' pairs get different rows from `beyond` on."""
    flat = expert.reshape(-1)
    order = jnp.argsort(flat, stable=True)
    rank = jnp.zeros_like(order).at[order].set(jnp.arange(order.size, dtype=order.dtype), unique_indices=True)
    counts = (flat[:, None] == jnp.arange(experts)).sum(0, dtype=jnp.int32)  # jnp.bincount's atomics would collide
    sizes = -(-counts // align) * align
    shift = (jnp.cumsum(sizes) - sizes) - (jnp.cumsum(counts) - counts)
    shift = jnp.append(shift, beyond)  # ranks are unique and below the number of pairs: so are these rows
    return (rank + shift[flat]).reshape(expert.shape), sizes
