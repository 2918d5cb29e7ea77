"""This device's experts, for the (token, expert) pairs that are theirs: a window of sorted rows at a time.

Of all pairs a device has its share of the experts, so rows are laid out for those alone, sorted by expert. A window is a
static number of rows, a bit more than an even share: normally one holds them all, and there is no loop. Whatever the
routing, no pair is dropped: there are as many windows as the rows need, and the buffers stay a window's.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int32, Shaped

from jax_mla_cp.mesh import vary_like
from jax_mla_cp.model.grouped_matmul import group_alignment, grouped_matmul

_FEWEST_ROWS = 4096  # below this a window is too small to be worth dividing
_ROUND_TO = 128


def apply_experts(
    x: Float[Array, "T D"],
    expert: Int32[Array, "T k"],
    weight: Float[Array, "T k"],
    gate_up: Float[Array, "G D 2F"],
    down: Float[Array, "G F D"],
    *,
    experts: int,
    first: Int32[Array, ""] | int,
    shares: int,
) -> Float[Array, "T D"]:
    """What E = `experts` experts add to each token. Pairs whose `expert` is not in [0, E) are others'.

    A token's experts are added in ascending order, in float32, and rounded once: its result depends neither on the rest
    of the batch nor on the windows, as far as each row's products don't.

    Args:
      gate_up, down: the weights of many; expert 0's are number `first`.
      shares: among how many devices the pairs are divided, which sizes the windows.
    """
    top = expert.shape[1]
    align = group_alignment(expert.size // shares, experts)
    most = _round_down(expert.size + experts * (align - 1), align)
    size = min(window_rows(-(-expert.size // shares), experts, align), most)
    windows = -(-most // size)

    with jax.named_scope("dispatch"):
        expert = jnp.where((expert >= 0) & (expert < experts), expert, experts)  # others' sort to the end
        expert, weight = lax.sort((expert, weight), dimension=1, num_keys=1)
        row, end = _lay_out(expert, experts, align, beyond=windows * size)
        # A row that no pair has reads token 0, like all the others of its kind: one row, that stays in the cache.
        pair_token = jnp.arange(expert.size, dtype=jnp.int32) // top
        token = _scatter(pair_token, row.reshape(-1), windows * size)
        weight = _scatter(weight.reshape(-1), row.reshape(-1), windows * size)

    def window(start: jax.Array | int, out: Float[Array, "T D"]) -> Float[Array, "T D"]:
        """`out`, and what the rows from `start` on add to it."""
        with jax.named_scope("dispatch"):
            rows = x.at[lax.dynamic_slice_in_dim(token, start, size)].get(mode="promise_in_bounds")
            sizes = jnp.diff(jnp.clip(end - start, 0, size), prepend=0)
        with jax.named_scope("experts"):
            gate, up = jnp.split(grouped_matmul(rows, gate_up, sizes, first).astype(jnp.float32), 2, axis=-1)
            # Weighted here, so that only sums are left below: a product beside a sum may or may not become one instruction
            # with one rounding, which is the compiler's choice, and another one in another window.
            weighted = jax.nn.silu(gate) * up * lax.dynamic_slice_in_dim(weight, start, size)[:, None]
            rows = grouped_matmul(weighted.astype(x.dtype), down, sizes, first)
        with jax.named_scope("combine"):
            for j in range(top):
                at = row[:, j] - start
                here = (at >= 0) & (at < size)
                part = rows.at[jnp.clip(at, 0, size - 1)].get(mode="promise_in_bounds").astype(jnp.float32)
                # Selected, not multiplied by 0: rows of no pair may hold anything, NaN included.
                out = out + jnp.where(here[:, None], part, 0)
        return out

    nothing = vary_like(jnp.zeros(x.shape, jnp.float32), x, expert, weight, gate_up, down)

    def one() -> Float[Array, "T D"]:
        return window(0, nothing).astype(x.dtype)

    def many() -> Float[Array, "T D"]:
        used = -(-end[-1] // size)
        return lax.fori_loop(0, used, lambda i, out: window(i * size, out), nothing).astype(x.dtype)

    return one() if windows == 1 else lax.cond(end[-1] <= size, one, many)


def window_rows(even: int, experts: int, align: int) -> int:
    """Rows of a window: a quarter more than an even share, and for each expert the half of `align` that it wastes on average."""
    rows = max(_FEWEST_ROWS, even * 5 // 4 + experts * align // 2)
    return _round_down(rows + _ROUND_TO - 1, _ROUND_TO)


def _scatter(values: Shaped[Array, " pairs"], row: Int32[Array, " pairs"], rows: int) -> Shaped[Array, " rows"]:
    return jnp.zeros(rows, values.dtype).at[row].set(values, mode="drop", unique_indices=True)


def _round_down(n: int, multiple: int) -> int:
    return n // multiple * multiple


def _lay_out(
    expert: Int32[Array, "T k"], experts: int, align: int, beyond: int
) -> tuple[Int32[Array, "T k"], Int32[Array, " E"]]:
    """Each pair's row, by expert and then by token; and where each expert's rows end.

    Every expert begins at a multiple of `align`, and ends at one. Pairs of no expert get rows of their own from `beyond` on.
    """
    flat = expert.reshape(-1)
    order = jnp.argsort(flat, stable=True)
    rank = jnp.zeros_like(order).at[order].set(jnp.arange(order.size, dtype=order.dtype), unique_indices=True)
    counts = (flat[:, None] == jnp.arange(experts)).sum(0, dtype=jnp.int32)  # bincount's atomics would collide
    sizes = -(-counts // align) * align
    end = jnp.cumsum(sizes)
    shift = (end - sizes) - (jnp.cumsum(counts) - counts)
    shift = jnp.append(shift, beyond)  # rank is below the number of pairs, and different for each: so are the rows
    return (rank + shift[flat]).reshape(expert.shape), end
