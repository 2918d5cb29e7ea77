"""Selection without sorting, against sorts; and no sort, loop or custom call in the sampler's program for GPUs."""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jax_mla_cp.batch.arrays import SamplingArrays
from jax_mla_cp.step import sampling, selection
from jax_mla_cp.step.logit_bias import LogitBiasArrays
from tests.step.test_sampling import how

SIZES = (1, 7, 20, 21, 511, 512, 513, 1000, 8192, 8197)
"""Of vocabularies: one, two and three levels of groups, and a last group that is not full."""
TIES = {
    "none": lambda rng, shape: rng.normal(0, 3, shape),
    "many": lambda rng, shape: rng.integers(-3, 1, shape),
    "bfloat16": lambda rng, shape: np.asarray(jnp.asarray(rng.normal(0, 3, shape), jnp.bfloat16), np.float32),
    "all": lambda rng, shape: np.zeros(shape),
    "masked": lambda rng, shape: np.where(rng.random(shape) < 0.99, -np.inf, rng.integers(-2, 2, shape)),
    "special": lambda rng, shape: rng.choice([-np.inf, -0.0, 0.0, np.inf, np.nan, 1e-45, -1e-45, 1.0], shape),
}

top_k_of_groups = jax.jit(selection._top_k_of_groups, static_argnums=1)
leading = jax.jit(selection.leading)


def random(ties: str, rows: int, size: int, seed: int) -> np.ndarray:
    return TIES[ties](np.random.default_rng(seed), (rows, size)).astype(np.float32)


def ranks(values: np.ndarray) -> np.ndarray:
    """Each value's number of those before it."""
    return np.argsort(np.argsort(-values, axis=1, kind="stable"), axis=1, kind="stable")


@given(st.sampled_from(SIZES), st.sampled_from(sorted(TIES)), st.sampled_from([1, 5]), st.integers(0, 2**31))
@settings(deadline=None, max_examples=60)
def test_top_k_is_laxs(size: int, ties: str, rows: int, seed: int) -> None:
    """Bit for bit, and so are the indices of equal ones."""
    values, k = random(ties, rows, size, seed), min(20, size)
    got, index = top_k_of_groups(values, k)
    want, place = jax.lax.top_k(values, k)
    np.testing.assert_array_equal(index, place)
    np.testing.assert_array_equal(np.asarray(got).view(np.uint32), np.asarray(want).view(np.uint32))
    if ties != "special":
        np.testing.assert_array_equal(index, np.argsort(-values, axis=1, kind="stable")[:, :k])


@given(st.sampled_from(SIZES), st.sampled_from(sorted(TIES.keys() - {"special"})), st.integers(0, 2**31), st.data())
@settings(deadline=None, max_examples=60)
def test_leading_counts_exactly(size: int, ties: str, seed: int, data: st.DataObject) -> None:
    values = random(ties, 3, size, seed)
    limit = data.draw(st.lists(st.integers(1, size + 2), min_size=3, max_size=3))
    got = leading(values, np.ones_like(values), np.array(limit, np.float32))
    np.testing.assert_array_equal(got, ranks(values) < np.array(limit)[:, None])


@given(st.sampled_from(SIZES), st.sampled_from(sorted(TIES.keys() - {"special"})), st.integers(0, 2**31))
@settings(deadline=None, max_examples=60)
def test_leading_sums_weights(size: int, ties: str, seed: int) -> None:
    """Weights in other orders than the values: multiples of 1/8, whose sums are exact."""
    rng = np.random.default_rng(seed)
    values, weights = random(ties, 3, size, seed), rng.integers(0, 9, (3, size)).astype(np.float32) / 8
    limit = np.array([0.125, np.inf, max(1, rng.integers(1, 2 + weights[2].sum() * 8)) / 8], np.float32)
    order = np.argsort(-values, axis=1, kind="stable")
    before = np.cumsum(np.take_along_axis(weights, order, 1), axis=1) - np.take_along_axis(weights, order, 1)
    want = np.zeros_like(values, bool)
    np.put_along_axis(want, order, before < limit[:, None], axis=1)
    np.testing.assert_array_equal(leading(values, weights, limit), want)


def masks(logits: np.ndarray, params: SamplingArrays) -> np.ndarray:
    """What `sample` may draw, by where its scaled log-probabilities are above -inf."""

    def run(logits: jax.Array, params: SamplingArrays) -> jax.Array:
        return sampling._truncated(jax.nn.log_softmax(logits), params) > -jnp.inf

    return np.asarray(jax.jit(run)(jnp.asarray(logits), params))


def margins(logits: np.ndarray, params: SamplingArrays, *, top_k_first: bool = True) -> np.ndarray:
    """By how much each token is in, in float64, as a part of the mass; infinite where no rounding is involved."""
    values = logits.astype(np.float64) / np.asarray(params.temperature)[:, None]
    p = np.exp(values - values.max(1, keepdims=True))
    with np.errstate(divide="ignore"):
        min_p = np.log(np.asarray(params.min_p, np.float64))[:, None]
    by_min_p = values - values.max(1, keepdims=True) - min_p
    rank = ranks(np.where(by_min_p >= 0, logits, -np.inf))
    top_k = np.asarray(params.top_k)[:, None]
    counted = (by_min_p >= 0) & ((top_k == 0) | (rank < top_k))
    p = np.where(counted if top_k_first else by_min_p >= 0, p, 0)
    order = np.argsort(rank, axis=1)
    ordered = np.take_along_axis(p, order, 1) / p.sum(1, keepdims=True)
    before = np.take_along_axis(np.cumsum(ordered, axis=1) - ordered, rank, 1)
    top_p = np.asarray(params.top_p, np.float64)[:, None]
    by_top_p = np.where((top_p >= 1) | (rank == 0), np.inf, top_p - before)
    return np.where(counted, np.minimum(by_top_p, by_min_p), -np.inf)


TOLERANCE = 2e-6
"""Of a sum of masses in float32; and of a logarithm times a temperature."""


def disagreements(got: np.ndarray, margin: np.ndarray) -> int:
    return int(((got != (margin > 0)) & (np.abs(margin) > TOLERANCE)).sum())


@pytest.mark.parametrize("size", [300, 20_000])
@pytest.mark.parametrize("ties", ["none", "bfloat16", "many"])
def test_truncation_is_float64s(size: int, ties: str) -> None:
    """All combinations in one batch; and each place as if it were alone."""
    rng, count = np.random.default_rng(size), 24
    logits = random(ties, count, size, size)
    index = np.arange(count)
    params = how(
        count,
        temperature=rng.uniform(0.5, 2, count).astype(np.float32),
        top_k=np.where(index % 2, rng.integers(1, size + 2, count), 0).astype(np.int32),
        top_p=np.where(index // 2 % 2, rng.uniform(0.01, 0.999, count), 1).astype(np.float32),
        min_p=np.where(index // 4 % 3 == 2, 0.01, 0).astype(np.float32),
    )
    got = masks(logits, params)
    assert disagreements(got, margins(logits, params)) == 0
    assert disagreements(got, margins(logits, params, top_k_first=False)) > 0, "negative control"
    assert got[index % 4 == 0].sum() > 0 and got.any(1).all()
    for i in range(8):
        others = [jax.tree.map(lambda x, i=i: x.at[:].set(x[i]), params), how(count)]
        mixed = jax.tree.map(lambda x, y, i=i: y.at[i].set(x[i]), params, others[1])
        for batch in (others[0], mixed):
            np.testing.assert_array_equal(masks(logits, batch)[i], got[i])


def test_off_is_off() -> None:
    """A place that does not truncate keeps its least likely token, whatever others do."""
    logits = random("none", 4, 20_000, 0)
    params = how(4, top_p=np.array([1, 0.5, 1, 0.01], np.float32), top_k=np.array([0, 3, 30_000, 0], np.int32))
    assert masks(logits, params).sum(1).tolist()[::2] == [20_000, 20_000]


@pytest.mark.parametrize("top_p", [1e-30, 1e-45])
def test_the_likeliest_token_stays(top_p: float) -> None:
    got = masks(random("many", 3, 300, 0), how(3, top_p=np.full(3, top_p, np.float32)))
    assert got.sum(1).tolist() == [1, 1, 1]


def test_nan_stays_in_its_row() -> None:
    values = random("none", 3, 1000, 0)
    want = top_k_of_groups(values, 20)[1]
    values[1] = np.nan
    got = top_k_of_groups(values, 20)[1]
    np.testing.assert_array_equal(np.asarray(got)[[0, 2]], np.asarray(want)[[0, 2]])
    params = how(3, top_k=np.full(3, 5, np.int32), top_p=np.full(3, 0.9, np.float32))
    kept = masks(values, params)
    values[1] = 0
    np.testing.assert_array_equal(kept[[0, 2]], masks(values, params)[[0, 2]])


def program(platform: str, *, bias: bool) -> str:
    places, size = 8, 8197
    arrays = LogitBiasArrays(
        jnp.zeros((places, size)),
        jnp.ones((places, size)),
        jnp.zeros((places, -(-size // 32)), jnp.uint32),
        jnp.zeros(places, bool),
    )
    traced = jax.jit(sampling.sample).trace(jnp.zeros((places, size)), how(places), *([arrays] if bias else []))
    return traced.lower(lowering_platforms=(platform,)).as_text()


UNRECORDABLE = re.compile(r"(?:stable)?hlo\.(?:sort|top_k|while|custom_call)\b")


@pytest.mark.parametrize("bias", [False, True])
def test_a_cuda_graph_can_record_the_sampler(bias: bool) -> None:
    assert not UNRECORDABLE.findall(program("cuda", bias=bias))
    assert set(UNRECORDABLE.findall(program("cpu", bias=bias))) == {"hlo.top_k", "stablehlo.while"}, "negative control"
