"""The step on CPU devices: sharded equals non-sharded, the cache is updated in place, stale memory stays out."""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_mla_cp.batch.step_request import StepRequest
from jax_mla_cp.step.forward import forward, to_devices
from jax_mla_cp.step.runner import compile_step
from tests.helpers.synthetic import CONFIG, Driver, random_model
from tests.test_cache import copies_of

PROMPTS = [np.random.default_rng(i).integers(0, CONFIG.vocab_size, n).tolist() for i, n in enumerate((150, 7, 1, 33))]


def play(driver: Driver) -> list[np.ndarray]:
    """Prefill together, decode together, then decode with a chunk beside it; prompt 0 comes in three uneven chunks."""
    dp = driver.planner.shape.dp
    a, b, c, d = (driver.request(i % dp) for i in range(4))
    out = [driver.step([(a, PROMPTS[0][:70]), (b, PROMPTS[1]), (c, PROMPTS[2])])]
    out.append(driver.step([(b, [3]), (c, [4]), (a, PROMPTS[0][70:71])]))
    out.append(driver.step([(c, [5]), (d, PROMPTS[3]), (a, PROMPTS[0][71:]), (b, [9])]))
    out.append(driver.step([(a, [1]), (b, [2]), (c, [3]), (d, [4])]))
    return out


@pytest.fixture(scope="module")
def expected() -> list[np.ndarray]:
    """The non-sharded jit."""
    return play(Driver(random_model()))


@pytest.mark.parametrize(
    ("mesh", "ep", "form"),
    [
        ("cp=1", "tp", "auto"),
        ("tp=8,cp=4", "tp", "auto"),
        ("tp=4,cp=2", "tp,cp", "expanded"),
        ("tp=2,cp=3", "tp,cp", "absorbed"),
        ("dp=2,cp=4", "tp,cp,dp", "auto"),
        ("cp=8", "tp", "expanded"),
        ("dp=2,tp=4,cp=2", "tp,cp,dp", "absorbed"),
    ],
)
def test_sharded_equals_plain_jit(mesh: str, ep: str, form: str, expected: list[np.ndarray]) -> None:
    for got, want in zip(play(Driver(random_model(mesh, ep), form=form)), expected, strict=True):
        np.testing.assert_allclose(got, want, atol=1e-5 * np.abs(want).max(), rtol=0)


@pytest.mark.parametrize(("shorts", "keys", "few"), [(5, True, True), (10, True, False), (10, False, False)])
def test_absorbed_rows_beside_expanded_ones(shorts: int, keys: bool, few: bool) -> None:
    """A long prompt among few or many short ones, and short ones alone: each request as if it were alone."""
    rng = np.random.default_rng(7)
    lengths = ([200] if keys else []) + [20] * shorts
    prompts = [rng.integers(0, CONFIG.vocab_size, n).tolist() for n in lengths]
    driver = Driver(random_model(), max_requests=12, chunk=512)
    requests = [StepRequest(prompt, 0, driver.request().pages) for prompt in prompts]
    step = driver.planner.lay_out([requests]).step
    assert (step.expanded_keys > 0) == keys and (step.absorbed_tokens < step.tokens) == few
    logits, _ = jax.jit(forward)(driver.model, driver.pages, driver.planner.batch(requests))
    for i, prompt in enumerate(prompts):
        alone = Driver(random_model(), max_requests=12, chunk=512)
        want = alone.step([(alone.request(), prompt)])[0]
        got = np.asarray(logits)[i, : CONFIG.vocab_size]
        np.testing.assert_allclose(got, want, atol=1e-5 * np.abs(want).max(), rtol=0)


def test_a_wrong_plan_is_noticed(expected: list[np.ndarray]) -> None:
    """Negative control: the same run with each rank's first row seeing one key less."""
    driver = Driver(random_model("cp=2"))
    request = driver.request()
    step_request = StepRequest(PROMPTS[0][:70], 0, request.pages)
    batch = driver.planner.host_batch([[step_request]])
    for rows in (batch.expanded, batch.absorbed):
        rows.kv_len[rows.kv_len > 1] -= 1
    logits, _ = forward(driver.model, driver.pages, to_devices(driver.model, batch))
    assert np.abs(np.asarray(logits)[0, : CONFIG.vocab_size] - expected[0][0]).max() > 1e-3 * np.abs(expected[0]).max()


@pytest.mark.parametrize("page_size", [1, 5, 64, 256])
def test_any_page_size(page_size: int, expected: list[np.ndarray]) -> None:
    for got, want in zip(play(Driver(random_model("cp=3"), page_size=page_size)), expected, strict=True):
        np.testing.assert_allclose(got, want, atol=1e-5 * np.abs(want).max(), rtol=0)


@pytest.mark.parametrize("form", ["expanded", "absorbed"])
def test_stale_memory_reaches_no_output(form: str) -> None:
    """NaN in every page of the cache before the request writes its own: free ones, and what is behind its last token."""
    model = random_model("tp=2,cp=2")
    clean, dirty = Driver(model, form=form), Driver(model, form=form)
    dirty.pages = jax.jit(lambda p: p * jnp.nan, donate_argnums=0)(dirty.pages)
    first, request = clean.request(), dirty.request()
    for tokens in (PROMPTS[0][:37], [5], PROMPTS[0][38:60]):
        want = clean.step([(first, tokens)])
        got = dirty.step([(request, tokens)])
        np.testing.assert_array_equal(got, want)
    used = set(request.pages[: -(-60 // 16)])
    cache = dirty.planner.shape.cache
    pages = np.asarray(dirty.pages).reshape(cache.layers, cache.pages_per_layer, cache.page_size, -1)
    for page in range(cache.pages_per_layer):
        assert np.isnan(pages[:, page]).all() != (page in used), (
            "padding is written nowhere, pages of the request are clean"
        )
    rest = pages[:, request.pages[3], 60 % 16 :]
    assert (rest == 0).all(), "the step that first writes a page zeroes the rest of it"


def test_a_neighbor_with_nan_latents_changes_nothing() -> None:
    driver = Driver(random_model("cp=2"), form="expanded")
    want = driver.step([(driver.request(), PROMPTS[0][:40])])
    first, second = driver.request(), driver.request()
    poison = np.full((50, CONFIG.hidden_size), np.nan, np.float32)
    embed = np.asarray(random_model().params["embed"][...])
    requests = [
        StepRequest(PROMPTS[0][:40], 0, first.pages, embeds=embed[PROMPTS[0][:40]]),
        StepRequest([0] * 50, 0, second.pages, embeds=poison),
    ]
    logits, _ = jax.jit(forward)(driver.model, driver.pages, driver.planner.batch(requests))
    logits = np.asarray(logits)[:, : CONFIG.vocab_size]
    np.testing.assert_allclose(logits[0], want[0], atol=1e-5 * np.abs(want).max(), rtol=0)
    assert np.isnan(logits[1]).all()


@pytest.mark.parametrize("form", ["expanded", "absorbed"])
def test_the_compiled_step_copies_no_cache(form: str) -> None:
    driver = Driver(random_model("tp=2,cp=2"), form=form)
    program = compile_step(driver.planner, driver.planner.step_shapes[-1])
    shape = driver.pages.shape
    assert not copies_of(program.as_text(), shape)
    stats = program.memory_analysis()
    assert stats.alias_size_in_bytes >= driver.pages.nbytes


def test_no_layer_slices_the_experts_weights() -> None:
    """The scan over layers slices every other parameter of a layer; a kernel would be given a copy of such a slice."""
    driver = Driver(random_model())
    batch = driver.planner.dummy_batch(driver.planner.step_shapes[-1])
    text = jax.jit(forward).lower(driver.model, driver.pages, to_devices(driver.model, batch)).as_text()
    c = CONFIG

    def slices(*shape: int) -> int:
        return len(re.findall(rf"dynamic_slice.*-> tensor<1x{'x'.join(map(str, shape))}xf32>", text))

    assert slices(c.hidden_size, c.n_routed_experts) > 0, "the router's"
    assert slices(c.n_routed_experts, c.hidden_size, 2 * c.moe_intermediate_size) == 0
    assert slices(c.n_routed_experts, c.moe_intermediate_size, c.hidden_size) == 0


def test_collectives_are_the_ones_designed() -> None:
    """Per layer: one all-gather (the latents, over cp) and all-reduces over tp; nothing else grows with the tokens."""
    driver = Driver(random_model("tp=2,cp=2"), form="expanded")
    step = driver.planner.step_shapes[-1]
    text = compile_step(driver.planner, step).as_text()
    gathers = re.findall(r"= \w+\[([\d,]*)\]\S* all-gather(?:-start)?\(", text)
    latents = f"{2 * step.tokens},{CONFIG.latent_dim}"
    # One in the dense layers' scan, one in the experts'; the logits' over tp; the sampled tokens' over cp.
    sampled = str(driver.planner.shape.max_requests)
    assert sorted(gathers) == sorted([latents, latents, f"2,{CONFIG.vocab_size}", sampled])
    assert not re.search(r"all-to-all|collective-permute", text)


def test_every_replica_of_the_cache_is_the_same() -> None:
    driver = Driver(random_model("dp=2,cp=2,tp=2"))
    play(driver)
    by_group: dict[int, list[np.ndarray]] = {}
    for shard in driver.pages.addressable_shards:
        by_group.setdefault(shard.index[0].start or 0, []).append(np.asarray(shard.data))
    assert len(by_group) == 2
    for copies in by_group.values():
        assert len(copies) == 4
        for copy in copies[1:]:
            np.testing.assert_array_equal(copy, copies[0])


def test_one_expert_takes_every_token() -> None:
    """No capacity, no drop: a router that sends all tokens to the same experts gives the same logits on every mesh."""

    def skewed(mesh: str | None, ep: str) -> np.ndarray:
        model = random_model(mesh, ep)
        bias = model.params["moe"]["mlp"]["bias"]
        favorite = jnp.arange(CONFIG.n_routed_experts) < CONFIG.experts_per_token
        bias.set_value(jax.device_put(jnp.where(favorite, 10.0, bias.get_value()), bias.get_value().sharding))
        return play(Driver(model))[0]

    want = skewed(None, "tp")
    for mesh, ep in (("tp=4,cp=2", "tp"), ("tp=2,cp=4", "tp,cp")):
        np.testing.assert_allclose(skewed(mesh, ep), want, atol=1e-5 * np.abs(want).max(), rtol=0)
