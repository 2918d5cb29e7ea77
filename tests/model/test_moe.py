"""Experts: the grouped product against a loop, with any sizes; cost by the rows that exist; the router's masks."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax

from jax_mla_cp.model.grouped_matmul import grouped_matmul
from jax_mla_cp.model.moe import route
from tests.synthetic import CONFIG, Driver, random_model

run = jax.jit(grouped_matmul)


@given(st.lists(st.integers(0, 90), min_size=4, max_size=4), st.integers(0, 300))
@settings(max_examples=40, deadline=None)
def test_grouped_matmul(sizes: list[int], seed: int) -> None:
    rng = np.random.default_rng(seed)
    rows, weights = rng.normal(size=(360, 6)).astype(np.float32), rng.normal(size=(4, 6, 5)).astype(np.float32)
    out = np.asarray(run(rows, weights, jnp.array(sizes, jnp.int32)))
    ends = np.cumsum(sizes)
    for e, end in enumerate(ends):
        part = slice(end - sizes[e], end)
        np.testing.assert_allclose(out[part], rows[part].astype(np.float64) @ weights[e], atol=1e-5)
    assert not out[ends[-1] :].any(), "rows of no group are zero"


def test_agrees_with_ragged_dot() -> None:
    """What runs on other devices than CPUs gives the same."""
    rng = np.random.default_rng(1)
    rows, weights = rng.normal(size=(64, 6)).astype(np.float32), rng.normal(size=(4, 6, 5)).astype(np.float32)
    sizes = jnp.array([10, 0, 50, 4], jnp.int32)
    np.testing.assert_allclose(run(rows, weights, sizes), lax.ragged_dot(rows, weights, sizes), atol=1e-5)


def test_the_router_masks_groups_with_minus_infinity() -> None:
    """Negative biased scores: a mask of 0 would choose experts of dropped groups before those of kept ones."""
    config = dataclasses.replace(CONFIG, experts_per_token=4)  # all of the two kept groups of two
    x = np.random.default_rng(0).normal(size=(50, 64)).astype(np.float32)
    router = np.random.default_rng(1).normal(size=(64, 8)).astype(np.float32)
    expert, weight = route(x, router, jnp.full(8, -5.0), config)
    scores = 1 / (1 + np.exp(-(x.astype(np.float64) @ router)))
    for t in range(50):
        groups = scores[t].reshape(4, 2).sum(1).argsort()[-2:]
        assert set(np.asarray(expert[t]) // 2) == set(groups)
        chosen = scores[t][np.asarray(expert[t])]
        np.testing.assert_allclose(weight[t], 2.5 * chosen / chosen.sum(), rtol=1e-4)


@pytest.mark.parametrize(("mesh", "ep"), [(None, "tp"), ("tp=2,cp=2", "tp,cp")])
def test_slices_of_tokens_change_nothing(mesh: str | None, ep: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The buffers' bound cuts long inputs into slices; uneven ones are padded with tokens that go to no expert."""
    tokens = np.random.default_rng(2).integers(0, CONFIG.vocab_size, 101).tolist()

    def logits() -> np.ndarray:
        driver = Driver(random_model(mesh, ep))
        return driver.step([(driver.request(), tokens)])

    whole = logits()
    monkeypatch.setattr("jax_mla_cp.model.moe._SLICE_ROWS", 40)
    np.testing.assert_allclose(logits(), whole, atol=1e-5 * np.abs(whole).max(), rtol=0)


def test_groups_of_heads_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """The bound on up-projected keys and values: heads are done in groups, with the same result."""
    tokens = np.random.default_rng(3).integers(0, CONFIG.vocab_size, 101).tolist()

    def logits() -> np.ndarray:
        driver = Driver(random_model("tp=2,cp=2"), form="expanded")
        return driver.step([(driver.request(), tokens)])

    whole = logits()
    monkeypatch.setattr("jax_mla_cp.model.mla._EXPANDED_BYTES", 90_000)  # two groups of two heads
    np.testing.assert_allclose(logits(), whole, atol=1e-6 * np.abs(whole).max(), rtol=0)
