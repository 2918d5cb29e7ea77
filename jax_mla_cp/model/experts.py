"""The products of this device's experts: their (token, expert) pairs as rows, sorted by expert, a window at a time.

Only the pairs of this device's experts get rows. A window is a static number of rows, a bit more than an even share of the
pairs: normally it holds all rows, and there is no loop. No pair is dropped, whatever the routing: skewed routing takes more
windows, in buffers of the same size.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int32, Shaped

from jax_mla_cp.mesh import vary_like
from jax_mla_cp.model.fp8 import Matrices
from jax_mla_cp.model.fp8_rows import Rows, ScaledRows
from jax_mla_cp.model.grouped_matmul import GroupedMatmul, group_alignment, grouped_matmul
from jax_mla_cp.model.quantize import quantize_gated

_MIN_WINDOW_ROWS = 4096  # a smaller window is not worth dividing
_ROUND_TO = 128


def apply_experts(
    x: Rows,
    expert: Int32[Array, "T k"],
    weight: Float[Array, "T k"],
    gate_up: Matrices,
    down: Matrices,
    *,
    num_experts: int,
    first: Int32[Array, ""] | int,
    ep_size: int,
    implementation: GroupedMatmul,
) -> Float[Array, "T D"]:
    """The weighted sum of each token's experts among the `num_experts` of this device.

    A token's experts are added in ascending order, in float32, and rounded once: its result depends neither on the rest
    of the batch nor on the windows, as far as each row's products don't.

    Args:
      x: the tokens [T, D]. If they are in FP8, so are the rows that `down` multiplies.
      expert: a pair with an `expert` outside [0, num_experts) is another device's.
      gate_up, down: [G, 2F, D] and [G, D, F], as `grouped_matmul` takes them; the weights of this device's experts begin at group `first`.
      ep_size: the number of devices that the experts are divided over; it sizes the windows.
      implementation: as in `grouped_matmul`.
    """
    k = expert.shape[1]
    share = -(-expert.size // ep_size)
    w8a8 = isinstance(x, ScaledRows)
    align = 1 if w8a8 else max(group_alignment(w, share, num_experts, implementation) for w in (gate_up, down))
    max_rows = _round_down(expert.size + num_experts * (align - 1), align)
    size = min(window_rows(share, num_experts, align), max_rows)
    windows = -(-max_rows // size)

    with jax.named_scope("dispatch"):
        # Other devices' pairs sort to the end.
        expert = jnp.where((expert >= 0) & (expert < num_experts), expert, num_experts)
        expert, weight = lax.sort((expert, weight), dimension=1, num_keys=1)
        row, end = _lay_out(expert, num_experts, align, beyond=windows * size)
        # A row without a pair reads token 0, as all such rows do: one row, which stays in the GPU's cache.
        pair_token = jnp.arange(expert.size, dtype=jnp.int32) // k
        token = _scatter(pair_token, row.reshape(-1), windows * size)
        weight = _scatter(weight.reshape(-1), row.reshape(-1), windows * size)

    product = functools.partial(grouped_matmul, implementation=implementation, expected_rows=share)

    def window(start: jax.Array | int, out: Float[Array, "T D"]) -> Float[Array, "T D"]:
        """`out` plus the sum of the rows from `start` on."""
        with jax.named_scope("dispatch"):
            taken = lax.dynamic_slice_in_dim(token, start, size)
            rows = jax.tree.map(lambda part: part.at[taken].get(mode="promise_in_bounds"), x)
            sizes = jnp.diff(jnp.clip(end - start, 0, size), prepend=0)
        with jax.named_scope("experts"):
            both = product(rows, gate_up, sizes, first)
            # Weighted here, so that only sums are left below: the compiler may fuse a product and a sum into an instruction
            # with one rounding, in some windows and not in others.
            row_weight = lax.dynamic_slice_in_dim(weight, start, size)
            hidden: Rows
            if w8a8:
                hidden = quantize_gated(both, row_weight, implementation)
            else:
                gate, up = jnp.split(both.astype(jnp.float32), 2, axis=-1)
                hidden = (jax.nn.silu(gate) * up * row_weight[:, None]).astype(dtype)
            out_rows = product(hidden, down, sizes, first)
        with jax.named_scope("combine"):
            for j in range(k):
                index = row[:, j] - start
                in_window = (index >= 0) & (index < size)
                part = out_rows.at[jnp.clip(index, 0, size - 1)].get(mode="promise_in_bounds").astype(jnp.float32)
                # Selected, not multiplied by 0: a row without a pair may hold anything, NaN included.
                out = out + jnp.where(in_window[:, None], part, 0)
        return out

    dtype = down.dtype
    zeros = vary_like(jnp.zeros(x.shape, jnp.float32), x, expert, weight, gate_up, down)

    def one_window() -> Float[Array, "T D"]:
        return window(0, zeros).astype(dtype)

    def all_windows() -> Float[Array, "T D"]:
        used = -(-end[-1] // size)
        return lax.fori_loop(0, used, lambda i, out: window(i * size, out), zeros).astype(dtype)

    return one_window() if windows == 1 else lax.cond(end[-1] <= size, one_window, all_windows)


def window_rows(even: int, experts: int, align: int) -> int:
    """The rows of a window: a quarter more than an `even` share of the pairs, and `align / 2` of padding for each expert."""
    rows = max(_MIN_WINDOW_ROWS, even * 5 // 4 + experts * align // 2)
    return _round_down(rows + _ROUND_TO - 1, _ROUND_TO)


def _scatter(values: Shaped[Array, " pairs"], row: Int32[Array, " pairs"], rows: int) -> Shaped[Array, " rows"]:
    return jnp.zeros(rows, values.dtype).at[row].set(values, mode="drop", unique_indices=True)


def _round_down(n: int, multiple: int) -> int:
    return n // multiple * multiple


def _lay_out(
    expert: Int32[Array, "T k"], experts: int, align: int, beyond: int
) -> tuple[Int32[Array, "T k"], Int32[Array, " E"]]:
    """Returns each pair's row, by expert and then by token, and the end of each expert's rows.

    An expert's rows begin and end at multiples of `align`. Other devices' pairs get different rows from `beyond` on.
    """
    flat = expert.reshape(-1)
    order = jnp.argsort(flat, stable=True)
    rank = jnp.zeros_like(order).at[order].set(jnp.arange(order.size, dtype=order.dtype), unique_indices=True)
    counts = (flat[:, None] == jnp.arange(experts)).sum(0, dtype=jnp.int32)  # jnp.bincount's atomics would collide
    sizes = -(-counts // align) * align
    end = jnp.cumsum(sizes)
    shift = (end - sizes) - (jnp.cumsum(counts) - counts)
    shift = jnp.append(shift, beyond)  # ranks are unique and below the number of pairs: so are these rows
    return (rank + shift[flat]).reshape(expert.shape), end
