"""Experts against a float64 loop, whatever the routing; windows and slices change nothing; the router's masks."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax

from jax_mla_cp.model.experts import apply_experts
from jax_mla_cp.model.grouped_matmul import grouped_matmul
from jax_mla_cp.model.router import _logits, _top_k, route
from tests.helpers.synthetic import CONFIG, Driver, random_model

TOKENS, TOP, EXPERTS, WIDTH, INNER = 200, 4, 6, 16, 8
"""The device has 6 of 12 experts: numbers 0 to 5. Others are -6 to -1."""


def routing(name: str) -> np.ndarray:
    rng = np.random.default_rng(5)
    expert = np.stack([rng.permutation(12)[:TOP] for _ in range(TOKENS)]) - 6
    others = np.stack([rng.permutation(6)[:TOP] for _ in range(TOKENS)]) - 6
    if name == "one":  # every token comes to expert 3, and to others elsewhere
        expert = np.where(np.arange(TOP) == 2, 3, others)
    if name == "all":  # nearly all pairs are here: twice the even share
        expert = np.where((np.arange(TOKENS) > 2)[:, None], others + 6, others)
    if name == "none":
        expert = others
    return np.sort(expert, -1).astype(np.int32)


def inputs(name: str, dtype: np.dtype | type = np.float32) -> tuple[jax.Array, ...]:
    rng = np.random.default_rng(6)
    x, gate_up, down = (
        rng.normal(size=s) for s in [(TOKENS, WIDTH), (EXPERTS, 2 * INNER, WIDTH), (EXPERTS, WIDTH, INNER)]
    )
    weight = rng.uniform(0.1, 1, (TOKENS, TOP))
    return (
        jnp.asarray(x, dtype),
        jnp.asarray(routing(name)),
        jnp.asarray(weight, np.float32),
        jnp.asarray(gate_up, dtype),
        jnp.asarray(down, dtype),
    )


def loop(x: jax.Array, expert: jax.Array, weight: jax.Array, gate_up: jax.Array, down: jax.Array) -> np.ndarray:
    x, expert, weight, gate_up, down = (np.asarray(a).astype(np.float64) for a in (x, expert, weight, gate_up, down))
    out = np.zeros_like(x)
    for t in range(len(x)):
        for e, w in zip(expert[t].astype(int), weight[t], strict=True):
            if 0 <= e < len(down):
                gate, up = np.split(gate_up[e] @ x[t], 2)
                out[t] += w * (down[e] @ (gate / (1 + np.exp(-gate)) * up))
    return out


def experts(shares: int) -> Callable[..., jax.Array]:
    return functools.partial(apply_experts, num_experts=EXPERTS, first=0, ep_size=shares, implementation="blocks")


def run(arrays: tuple[jax.Array, ...], shares: int = 2) -> np.ndarray:
    # A new function each time: what the tests replace must not be found in a cache of the last one's program.
    return np.asarray(jax.jit(experts(shares))(*arrays))


@pytest.fixture
def replace(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str, object], None]]:
    """Replaces something inside the model, and forgets the programs traced with what it was: drivers share theirs."""

    def set_value(name: str, value: object) -> None:
        monkeypatch.setattr(f"jax_mla_cp.model.{name}", value)
        jax.clear_caches()

    yield set_value
    jax.clear_caches()


@pytest.fixture
def small_windows(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    return lambda rows: monkeypatch.setattr("jax_mla_cp.model.experts.window_rows", lambda even, experts, align: rows)


@pytest.mark.parametrize("name", ["even", "one", "all", "none"])
@pytest.mark.parametrize("rows", [None, 48, 512])
def test_experts_against_a_loop(name: str, rows: int | None, small_windows: Callable[[int], None]) -> None:
    """One window, many, or one that even routing would fit: no pair is dropped, whatever the routing."""
    if rows:
        small_windows(rows)
    arrays = inputs(name)
    np.testing.assert_allclose(run(arrays), loop(*arrays), atol=1e-4)
    if name != "none":  # the test can fail: one pair less is seen
        expert = np.asarray(arrays[1])
        lost = np.argwhere(expert >= 0)[-1]
        fewer = np.where((lost == np.indices(expert.shape).T).all(-1).T, -1, expert)
        with pytest.raises(AssertionError):
            np.testing.assert_allclose(run(arrays), loop(arrays[0], fewer, *arrays[2:]), atol=1e-4)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["even", "one", "all"])
@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16])
def test_windows_change_no_bit(name: str, dtype: type, small_windows: Callable[[int], None]) -> None:
    """Windows cut through experts and through tokens' sums; 512 is the branch without the loop, for the even routing."""
    arrays = inputs(name, dtype)
    whole = run(arrays)
    for rows in (32, 128, 512):
        small_windows(rows)
        np.testing.assert_array_equal(run(arrays), whole)


def test_the_rest_of_the_batch_changes_no_bit() -> None:
    x, expert, weight, *experts = inputs("even")
    x2, expert2, weight2, *_ = inputs("all")
    mine = (np.arange(TOKENS) % 7 == 0)[:, None]
    mixed = (jnp.where(mine, x, x2 + 1), jnp.where(mine, expert, expert2), jnp.where(mine, weight, weight2 + 1))
    ours, theirs = run((x, expert, weight, *experts)), run((*mixed, *experts))
    np.testing.assert_array_equal(ours[::7], theirs[::7])
    assert (ours != theirs).any(1).sum() > TOKENS // 2


@pytest.mark.parametrize("align", [1, 8])
@pytest.mark.parametrize("rows", [None, 56, 512])
@pytest.mark.parametrize("name", ["even", "all"])
def test_rows_of_no_expert_stay_out(
    align: int, rows: int | None, name: str, monkeypatch: pytest.MonkeyPatch, small_windows: Callable[[int], None]
) -> None:
    """On a GPU what lies behind the groups is memory that nobody wrote. Groups that begin at multiples leave gaps too."""
    arrays = inputs(name)
    clean = run(arrays)
    seen = []

    def unwritten(rows: jax.Array, weights: jax.Array, sizes: jax.Array, first: int, **how: Any) -> jax.Array:
        used = jnp.arange(rows.shape[0]) < sizes.sum()
        out = grouped_matmul(rows, weights, sizes, first, **how)
        out = jnp.where(used[:, None], out, jnp.nan)
        jax.debug.callback(lambda bad: seen.append(bool(bad)), jnp.isnan(out).any())
        return out

    monkeypatch.setattr("jax_mla_cp.model.experts.grouped_matmul", unwritten)
    monkeypatch.setattr("jax_mla_cp.model.experts.group_alignment", lambda *_: align)
    if rows:
        small_windows(rows)
    dirty = run(arrays)
    jax.effects_barrier()
    np.testing.assert_array_equal(dirty, clean)
    assert any(seen), "the products held NaN"


def test_a_window_bounds_the_buffers(small_windows: Callable[[int], None]) -> None:
    """Temporary memory with windows of an eighth of the pairs, and with one of all of them; and no loop where none is needed."""
    shapes = [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in inputs("all")]
    shapes[0] = jax.ShapeDtypeStruct((4096, 256), np.float32)
    shapes[1:3] = (jax.ShapeDtypeStruct((4096, 8), d) for d in (np.int32, np.float32))
    shapes[3:] = (jax.ShapeDtypeStruct(s, np.float32) for s in [(EXPERTS, 512, 256), (EXPERTS, 256, 256)])

    def temporaries(rows: int) -> int:
        small_windows(rows)
        compiled = jax.jit(experts(8)).lower(*shapes).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    pairs, token = 4096 * 8, 256 * 4
    window = temporaries(pairs // 8)
    # Rows, gate and up, their product, and the experts' results of a window; a token's sum in each branch; four numbers a pair.
    assert window < pairs // 8 * 5 * token + 2 * 4096 * token + 8 * 4 * pairs
    assert temporaries(pairs) > 2 * window


def test_one_window_is_one_straight_pass(small_windows: Callable[[int], None]) -> None:
    def branches() -> int:
        return str(jax.make_jaxpr(experts(2))(*inputs("even"))).count(" cond[")

    assert branches() == 0
    small_windows(512)
    assert branches() == 1


@pytest.mark.parametrize(
    ("mesh", "ep"),
    [
        (None, "tp"),
        (None, "none"),
        ("tp=2,cp=2", "none"),
        ("tp=2,cp=2", "tp"),
        ("tp=2,cp=2", "tp,cp"),
        ("tp=2,cp=2", "tp,cp,dp"),
        ("dp=2,tp=2", "tp,cp,dp"),
    ],
)
def test_windows_on_meshes(mesh: str | None, ep: str, replace: Callable[[str, object], None]) -> None:
    """A window that holds some devices' pairs and not others': each device chooses for itself."""
    tokens = np.random.default_rng(2).integers(0, CONFIG.vocab_size, 101).tolist()

    def logits(mesh: str | None, ep: str) -> np.ndarray:
        driver = Driver(random_model(mesh, ep))
        return driver.step([(driver.request(), tokens)])

    whole = logits(None, "tp")
    replace("experts.window_rows", lambda even, experts, align: 48)
    np.testing.assert_allclose(logits(mesh, ep), whole, atol=1e-5 * np.abs(whole).max(), rtol=0)

    def one_window_only(pred: jax.Array, one: Callable[[], jax.Array], every: Callable[[], jax.Array]) -> jax.Array:
        return one()

    replace("experts.lax.cond", one_window_only)
    lost = logits(mesh, ep)
    assert np.abs(lost - whole).max() > 1e-2 * np.abs(whole).max(), "the windows were too small for one"


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


def test_experts_come_in_ascending_order_and_padding_goes_to_none() -> None:
    """The order in which a token's experts are added, and the layer's bias of a stack of them."""
    rng = np.random.default_rng(4)
    x, router, biases = (rng.normal(size=s).astype(np.float32) for s in ((30, 64), (64, 8), (3, 8)))
    valid = np.arange(30) < 20
    expert, weight = map(np.asarray, route(x, router, biases, CONFIG, layer=1, valid=valid, no_expert=77))
    assert (np.diff(expert[valid], axis=-1) > 0).all()
    assert (expert[~valid] == 77).all()
    alone, alone_weight = map(np.asarray, route(x, router, biases[1], CONFIG))
    np.testing.assert_array_equal(expert[valid], alone[valid])
    np.testing.assert_array_equal(weight[valid], alone_weight[valid])
    assert (np.asarray(route(x, router, biases, CONFIG, layer=2)[0]) != alone).any()


@pytest.mark.parametrize(("mesh", "ep"), [(None, "tp"), ("tp=2", "none"), ("tp=2,cp=2", "tp,cp")])
def test_slices_of_tokens_change_nothing(mesh: str | None, ep: str, replace: Callable[[str, object], None]) -> None:
    """The buffers' bound cuts long inputs into slices; uneven ones are padded with tokens that go to no expert."""
    tokens = np.random.default_rng(2).integers(0, CONFIG.vocab_size, 101).tolist()

    def logits() -> np.ndarray:
        driver = Driver(random_model(mesh, ep))
        return driver.step([(driver.request(), tokens)])

    whole = logits()
    replace("moe._MAX_TOKENS", 20)
    np.testing.assert_allclose(logits(), whole, atol=1e-5 * np.abs(whole).max(), rtol=0)


def test_groups_of_heads_change_nothing(replace: Callable[[str, object], None]) -> None:
    """The bound on up-projected keys and values: heads are done in groups, with the same result but for XLA's rounding."""
    tokens = np.random.default_rng(3).integers(0, CONFIG.vocab_size, 101).tolist()

    def logits() -> np.ndarray:
        driver = Driver(random_model("tp=2,cp=2"), form="expanded")
        return driver.step([(driver.request(), tokens)])

    whole = logits()
    replace("mla._EXPANDED_BYTES", 90_000)  # one head at a time
    np.testing.assert_allclose(logits(), whole, atol=1e-5 * np.abs(whole).max(), rtol=0)


def test_a_bfloat16_token_is_routed_as_in_float32() -> None:
    """Scores as exact as float32's own, with a router that bfloat16 does not hold; a rounded router is far off."""
    rng = np.random.default_rng(5)
    x = jnp.asarray(rng.normal(size=(64, 512)), jnp.bfloat16)
    router = rng.normal(size=(512, 32)).astype(np.float32)
    exact = np.asarray(x).astype(np.float64) @ router

    def error(logits: jax.Array) -> float:
        return float(np.abs(np.asarray(logits, np.float64) - exact).max())

    logits = jax.jit(lambda x, router: _logits(x, router).sum(1))
    assert error(logits(x, router)) < 2 * error(logits(x.astype(jnp.float32), router)) < 1e-3
    assert error(logits(x, router.astype(jnp.bfloat16).astype(np.float32))) > 1e-2


@given(st.lists(st.integers(-3, 3), min_size=6, max_size=6), st.integers(1, 6))
@settings(deadline=None, max_examples=50)
def test_top_k_is_that_of_lax(values: list[int], k: int) -> None:
    x = jnp.asarray([values, values[::-1]], jnp.float32)
    np.testing.assert_array_equal(_top_k(x, k), lax.top_k(x, k)[1])
