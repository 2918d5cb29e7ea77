"""The rows of (token, expert) pairs, against a loop."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from jax_mla_cp.model.dispatch import lay_out


@settings(max_examples=60, deadline=None)
@given(
    tokens=st.integers(1, 12),
    k=st.integers(1, 4),
    num_experts=st.integers(1, 5),
    align=st.sampled_from([1, 4, 8]),
    seed=st.integers(0, 99),
)
def test_rows_by_expert_and_then_by_token(tokens: int, k: int, num_experts: int, align: int, seed: int) -> None:
    """Experts from -2 on, and up to two past this device's."""
    rng = np.random.default_rng(seed)
    expert = np.sort(rng.integers(-2, num_experts + 2, (tokens, k)), -1).astype(np.int32)
    weight = rng.uniform(0.1, 1, (tokens, k)).astype(np.float32)
    rows = (tokens * k + num_experts * (align - 1)) // align * align + align
    layout = lay_out(jnp.asarray(expert), jnp.asarray(weight), num_experts, align, rows, kernels=False)

    place = np.full((tokens, k), -1)
    token, row_weight, end = np.zeros(rows, int), np.zeros(rows, np.float32), []
    row = 0
    for e in range(num_experts):
        for t, j in np.argwhere(expert == e):
            place[t, j], token[row], row_weight[row] = row, t, weight[t, j]
            row += 1
        row = -(-row // align) * align
        end.append(row)
    mine = place >= 0
    np.testing.assert_array_equal(np.asarray(layout.place)[mine], place[mine])
    assert (np.asarray(layout.place)[~mine] >= rows).all()
    np.testing.assert_array_equal(layout.token, token)
    np.testing.assert_array_equal(layout.weight, row_weight)
    np.testing.assert_array_equal(layout.end, end)
    np.testing.assert_array_equal(layout.sizes, np.diff(end, prepend=0))
