"""The small kernels of a decode step on a Hopper GPU, against float64 and the XLA code that they replace."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_mla_cp.attention import fa3
from jax_mla_cp.config.model import ModelConfig
from jax_mla_cp.config.presets import model_config
from jax_mla_cp.model.dispatch import lay_out
from jax_mla_cp.model.norm import add_norm
from jax_mla_cp.model.router import route
from tests.helpers import attention_cases as cases
from tests.helpers.attention_cases import RAGGED, TARGETS

ROUTERS = {
    "greedy, 64": model_config("deepseek_v2_lite"),
    "groups, 160": model_config("deepseek_v2"),
    "bias and groups, 256": model_config("deepseek_v3"),
    "bias, 384": model_config("kimi_k2"),
}


def reference_route(
    x: np.ndarray, router: np.ndarray, bias: np.ndarray | None, c: ModelConfig
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(experts in ascending order, their weights, and the least distance of a score from one that is chosen) in float64."""
    logits = x.astype(np.float64) @ router.astype(np.float64)
    if bias is None:
        scores = np.exp(logits - logits.max(-1, keepdims=True))
        scores /= scores.sum(-1, keepdims=True)
    else:
        scores = 1 / (1 + np.exp(-logits))
    choice = scores if bias is None else scores + bias
    margin = np.full(len(x), np.inf)
    if c.n_group > 1:
        grouped = choice.reshape(len(x), c.n_group, -1)
        group = np.sort(grouped, -1)[..., -1 if bias is None else -2 :].sum(-1)
        ranked = np.sort(group, -1)
        margin = ranked[:, -c.topk_group] - ranked[:, -c.topk_group - 1]
        kept = group >= ranked[:, -c.topk_group, None]
        choice = np.where(kept[..., None], grouped, -np.inf).reshape(choice.shape)
    ranked = np.sort(choice, -1)
    k = c.experts_per_token
    margin = np.minimum(margin, ranked[:, -k] - ranked[:, -k - 1])
    expert = np.sort(np.argsort(-choice, -1, kind="stable")[:, :k], -1)
    weight = np.take_along_axis(scores, expert, -1)
    if c.norm_topk_prob:
        weight /= weight.sum(-1, keepdims=True)
    return expert, weight * c.routed_scaling_factor, margin


@pytest.mark.parametrize("name", ROUTERS)
@pytest.mark.parametrize("tokens", [1, 67])
def test_route(name: str, tokens: int) -> None:
    c = dataclasses.replace(ROUTERS[name], hidden_size=256)
    rng = np.random.default_rng(tokens)
    x = jnp.asarray(rng.normal(size=(tokens, 256)), jnp.bfloat16)
    router = rng.normal(size=(256, c.n_routed_experts), scale=1 / 16).astype(np.float32)
    biases = rng.normal(size=(3, c.n_routed_experts), scale=0.1).astype(np.float32) if c.routing_bias else None

    @jax.jit
    def kernel(x: jax.Array, layer: jax.Array, valid: jax.Array) -> tuple[jax.Array, jax.Array]:
        return route(x, router, biases, c, layer=layer, valid=valid, no_expert=999, kernels=True)

    valid = np.arange(tokens) != 5
    expert, weight = map(np.asarray, kernel(x, jnp.int32(2), valid))
    bias = None if biases is None else biases[2]
    want, want_weight, margin = reference_route(np.asarray(x), router, bias, c)
    sure = valid & (margin > 1e-5)
    assert sure.mean() > 0.9
    np.testing.assert_array_equal(expert[sure], want[sure])
    np.testing.assert_allclose(weight[sure], want_weight[sure], rtol=1e-4)
    assert (expert[~valid] == 999).all()
    if biases is not None:  # the test can fail: another layer's bias chooses others
        others, _ = map(np.asarray, kernel(x, jnp.int32(1), valid))
        assert (others != expert).any()
    again = kernel(x, jnp.int32(2), valid)
    for got, first in zip(again, (expert, weight), strict=True):
        np.testing.assert_array_equal(got, first)


@pytest.mark.parametrize("name", ROUTERS)
def test_equal_and_nan_scores(name: str) -> None:
    """The first of equal experts is chosen, as in XLA; a token of NaN gets experts that exist, and weights of NaN."""
    c = dataclasses.replace(ROUTERS[name], hidden_size=64)
    bias = np.zeros((1, c.n_routed_experts), np.float32) if c.routing_bias else None
    x = jnp.zeros((2, 64), jnp.bfloat16).at[1].set(jnp.nan)
    router = jnp.ones((64, c.n_routed_experts), jnp.float32)
    expert, weight = map(np.asarray, route(x, router, bias, c, kernels=True))
    want, want_weight = map(np.asarray, route(x[:1], router, bias, c))
    np.testing.assert_array_equal(expert[:1], want)
    np.testing.assert_allclose(weight[:1], want_weight, rtol=1e-6)
    assert ((expert >= 0) & (expert < c.n_routed_experts)).all()
    assert np.isnan(weight[1]).all()


@pytest.mark.parametrize("tokens", [1, 16, 100, 512])
@pytest.mark.parametrize(("experts", "of"), [(6, 6), (64, 64), (32, 256), (384, 384), (48, 64)])
@pytest.mark.parametrize("skewed", [False, True])
def test_sort_pairs(tokens: int, experts: int, of: int, skewed: bool) -> None:
    rng = np.random.default_rng(tokens)
    k = min(8, of)
    expert = np.sort(np.stack([rng.permutation(of)[:k] for _ in range(tokens)]), -1).astype(np.int32) - (of - experts)
    if skewed:
        expert[:] = np.arange(k)
    weight = rng.uniform(0.1, 1, (tokens, k)).astype(np.float32)
    got = lay_out(jnp.asarray(expert), jnp.asarray(weight), experts, 1, expert.size, kernels=True)
    want = lay_out(jnp.asarray(expert), jnp.asarray(weight), experts, 1, expert.size, kernels=False)
    mine = (expert >= 0) & (expert < experts)
    np.testing.assert_array_equal(np.asarray(got.place)[mine], np.asarray(want.place)[mine])
    assert (np.asarray(got.place)[~mine] >= expert.size).all()
    for name in ("sizes", "token", "weight"):
        np.testing.assert_array_equal(getattr(got, name), getattr(want, name), err_msg=name)
    assert got.sizes.sum() == mine.sum() and (mine.any() or tokens == 1)


@pytest.mark.parametrize(("rows", "columns"), [(1, 64), (16, 2048), (3, 7168), (130, 5120), (2, 16384)])
def test_add_norm(rows: int, columns: int) -> None:
    rng = np.random.default_rng(0)
    x, part = (jnp.asarray(rng.normal(size=(rows, columns)), jnp.bfloat16) for _ in range(2))
    weight = jnp.asarray(rng.normal(size=(3, columns)), jnp.bfloat16)
    kernel = jax.jit(lambda x, part, layer: add_norm(x, part, weight, layer, 1e-6, kernels=True))
    total, normed = map(np.asarray, kernel(x, part, jnp.int32(1)))
    np.testing.assert_array_equal(total, np.asarray(x + part))
    wide = total.astype(np.float64)
    want = wide / np.sqrt((wide**2).mean(-1, keepdims=True) + 1e-6) * np.asarray(weight[1]).astype(np.float64)
    np.testing.assert_allclose(normed.astype(np.float64), want, rtol=2**-7, atol=1e-30)
    assert np.abs(normed.astype(np.float64) - want).mean() < 2**-8 * np.abs(want).mean()
    other = np.asarray(kernel(x, part, jnp.int32(2))[1])
    assert (other != normed).mean() > 0.5, "another layer's weights"


def test_splits_made_once_change_no_bit() -> None:
    case = cases.absorbed(RAGGED, 16, 64)
    rows = dataclasses.replace(case.rows, **{f: jnp.asarray(getattr(case.rows, f)) for f in ("cu_q", "kv_len")})
    scheduled = fa3.schedule(rows, case.operands[1].shape[0], 16)
    assert scheduled.splits is not None
    dataclasses.replace(case, rows=scheduled).check("mla_decode")
    for _ in range(3):  # a call leaves them as they were
        got = TARGETS["mla_decode"](*case.operands, scheduled, scale=case.scale)
        for a, b in zip(got, TARGETS["mla_decode"](*case.operands, case.rows, scale=case.scale), strict=True):
            np.testing.assert_array_equal(np.asarray(a).view(np.uint8), np.asarray(b).view(np.uint8))
