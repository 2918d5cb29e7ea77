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
from jaxtyping import Array, Float, Int32

from jax_mla_cp.mesh import vary_like
from jax_mla_cp.model.dispatch import lay_out
from jax_mla_cp.model.fp8 import Matrices
from jax_mla_cp.model.fp8_rows import Rows, ScaledRows
from jax_mla_cp.model.grouped_matmul import GroupedMatmul, group_alignment, grouped_matmul, has_kernels
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
      expert: in ascending order of each token. A pair with an `expert` outside [0, num_experts) is another device's.
      gate_up, down: [G, 2F, D] and [G, D, F], as `grouped_matmul` takes them; the weights of this device's experts begin at group `first`.
      ep_size: the number of devices that the experts are divided over; it sizes the windows.
      implementation: as in `grouped_matmul`.
    """
    k = expert.shape[1]
    share = -(-expert.size // ep_size)
    w8a8, kernels = isinstance(x, ScaledRows), has_kernels(implementation)
    align = 1 if w8a8 else max(group_alignment(w, share, num_experts, implementation) for w in (gate_up, down))
    max_rows = _round_down(expert.size + num_experts * (align - 1), align)
    size = min(window_rows(share, num_experts, align), max_rows)
    windows = -(-max_rows // size)

    with jax.named_scope("dispatch"):
        rows = lay_out(expert, weight, num_experts, align, windows * size, kernels=kernels)

    product = functools.partial(grouped_matmul, implementation=implementation, expected_rows=share)

    def window(start: jax.Array | int, out: Float[Array, "T D"]) -> Float[Array, "T D"]:
        """`out` plus the sum of the rows from `start` on."""
        with jax.named_scope("dispatch"):
            taken = lax.dynamic_slice_in_dim(rows.token, start, size)
            taken_rows = jax.tree.map(lambda part: part.at[taken].get(mode="promise_in_bounds"), x)
            sizes = rows.sizes if windows == 1 else jnp.diff(jnp.clip(rows.end - start, 0, size), prepend=0)
        with jax.named_scope("experts"):
            both = product(taken_rows, gate_up, sizes, first)
            # Weighted here, so that only sums are left below: the compiler may fuse a product and a sum into an instruction
            # with one rounding, in some windows and not in others.
            row_weight = lax.dynamic_slice_in_dim(rows.weight, start, size)
            hidden: Rows
            if w8a8:
                hidden = quantize_gated(both, row_weight, kernels=kernels)
            else:
                gate, up = jnp.split(both.astype(jnp.float32), 2, axis=-1)
                hidden = (jax.nn.silu(gate) * up * row_weight[:, None]).astype(dtype)
            out_rows = product(hidden, down, sizes, first)
        with jax.named_scope("combine"):
            for j in range(k):
                index = rows.place[:, j] - start
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
        used = -(-rows.end[-1] // size)
        return lax.fori_loop(0, used, lambda i, out: window(i * size, out), zeros).astype(dtype)

    return one_window() if windows == 1 else lax.cond(rows.end[-1] <= size, one_window, all_windows)


def window_rows(even: int, experts: int, align: int) -> int:
    """The rows of a window: a quarter more than an `even` share of the pairs, and `align / 2` of padding for each expert."""
    rows = max(_MIN_WINDOW_ROWS, even * 5 // 4 + experts * align // 2)
    return _round_down(rows + _ROUND_TO - 1, _ROUND_TO)


def _round_down(n: int, multiple: int) -> int:
    return n // multiple * multiple
