"""Parity with transformers' DeepSeek-V2, V3 and Kimi K2.5, in float32, on small random checkpoints that it wrote."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import torch
from transformers import DeepseekV2Config
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2TopkRouter

import jax_mla_cp as mla
from jax_mla_cp.model.router import route
from tests.helpers.checkpoints import hf_cache, hf_generate, hf_logits, read_weights
from tests.helpers.reference import forward as reference
from tests.helpers.synthetic import CONFIG, Driver, Request

Checkpoints = Callable[[str], tuple[dict[str, Any], Path]]

# A subset that covers cp 1, 2, 3, 4, 8; tp 1, 2, 4, 8; dp 1, 2; every --ep-axes; both forms; every variant.
CASES = [
    ("v3", None, "auto", "auto"),
    ("v3", "dp=2,cp=4", "tp,cp,dp", "expanded"),  # the deployment of SGLang's PR: experts over all 8 devices
    ("v3", "tp=8,cp=4", "tp", "absorbed"),
    ("no_q_lora", "tp=2,cp=3", "tp,cp", "expanded"),
    ("one_group", "tp=4,cp=2", "tp,cp", "absorbed"),
    ("two_groups", "tp=2,cp=4", "none", "auto"),
    ("odd_vocab", "dp=2,tp=4,cp=2", "tp", "expanded"),
    ("tied", "tp=8", "tp", "auto"),
    ("old_config", "dp=2,tp=2,cp=2", "tp,cp,dp", "absorbed"),
    ("plain_rope", "cp=3", "tp,cp", "expanded"),
    ("rope_halves", "tp=2", "auto", "absorbed"),
    ("all_dense", "tp=2,cp=2", "auto", "auto"),
    ("no_dense", "cp=4", "tp,cp", "auto"),
    ("sharded", "tp=4,cp=8", "auto", "auto"),
    ("v2", "tp=2,cp=3", "tp,cp", "expanded"),
    ("v2_lite", "dp=2,tp=2,cp=2", "tp,cp,dp", "absorbed"),
    ("v2_lite", "tp=4", "none", "auto"),
    ("k25", "tp=4,cp=2", "tp,cp", "auto"),
]


SOFTMAX: dict[str, dict[str, Any]] = {
    "greedy": {"topk_method": "greedy", "n_group": 1, "topk_group": 1},
    "group_limited_greedy": {"topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2},
}
"""The softmax routers, for the eight experts of these models."""


def prompts(vocab: int, lengths: tuple[int, ...], seed: int = 7) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(0, vocab, n).tolist() for n in lengths]


def play(driver: Driver, texts: list[list[int]]) -> tuple[list[Request], list[np.ndarray]]:
    """Uneven prompts, one in three chunks, some shorter than 2 cp, with decoding beside; returns their last logits."""
    dp = driver.planner.shape.dp
    requests = [driver.request(i % dp) for i in range(4)]
    long, short, one, middle = requests
    cuts = (0, 70, 71, 150)
    driver.step([(long, texts[0][: cuts[1]]), (short, texts[1][:-1])])
    driver.step([(short, texts[1][-1:]), (long, texts[0][cuts[1] : cuts[2]]), (middle, texts[3][:20])])
    logits = driver.step([(one, texts[2]), (long, texts[0][cuts[2] :]), (middle, texts[3][20:])])
    again = driver.step([(one, [5]), (short, [6])])
    return requests, [logits[1], again[1], again[0], logits[2]]


@pytest.mark.parametrize(("variant", "mesh", "ep", "form"), CASES)
def test_logits_and_latents(
    variant: str,
    mesh: str | None,
    ep: Any,
    form: str,
    checkpoint: Checkpoints,
    transformers_model: Callable[[str], Any],
) -> None:
    hf = transformers_model(variant)
    model, _ = mla.load(checkpoint(variant)[1], mesh=mla.make_mesh(mesh) if mesh else None, dtype="float32", ep_axes=ep)
    texts = prompts(model.config.vocab_size, (150, 9, 1, 33))
    driver = Driver(model, form=form)
    requests, got = play(driver, texts)
    for request, logits in zip(requests, got, strict=True):
        want = hf_logits(hf, request.tokens)[-1]
        assert np.abs(logits - want).max() < 1e-4 * np.abs(want).max()
        latents = np.stack([np.concatenate(pair, axis=-1) for pair in hf_cache(hf, request.tokens)])
        for shard in driver.pages.addressable_shards:  # every rank's copy
            group = (shard.index[0].start or 0) // driver.planner.shape.cache.total_pages
            if group == request.group:
                # float32, at the scale of the values: layers differ in it
                assert (
                    np.abs(driver.latents(request, np.asarray(shard.data)) - latents).max()
                    < 1e-5 * np.abs(latents).max()
                )


def test_the_float64_reference_agrees(checkpoint: Checkpoints) -> None:
    """A second oracle, with none of transformers' code: naive NumPy in float64."""
    config, path = checkpoint("v3")
    model, _ = mla.load(path, mesh=mla.make_mesh("tp=2,cp=2"), dtype="float32")
    texts = prompts(config["vocab_size"], (150, 9, 1, 33))
    requests, got = play(Driver(model), texts)
    want = reference(model.config, read_weights(path), requests[0].tokens).logits[-1]
    assert np.abs(got[0] - want).max() < 1e-5 * np.abs(want).max()


def test_a_model_with_one_wrong_number_is_noticed(
    checkpoint: Checkpoints, transformers_model: Callable[[str], Any]
) -> None:
    """Negative control: a bias of the router that is off by 1 fails the bound by far."""
    config, path = checkpoint("v3")
    model, _ = mla.load(path, dtype="float32")
    bias = model.params["moe"]["mlp"]["bias"]
    bias.set_value(bias.get_value().at[0, 0].add(1.0))
    texts = prompts(config["vocab_size"], (150, 9, 1, 33))
    requests, got = play(Driver(model), texts)
    want = hf_logits(transformers_model("v3"), requests[0].tokens)[-1]
    assert np.abs(got[0] - want).max() > 1e-3 * np.abs(want).max()


@pytest.mark.parametrize(
    ("variant", "change"),
    [
        ("v2", SOFTMAX["greedy"]),
        ("v2_lite", SOFTMAX["group_limited_greedy"]),
        ("k25", {"routed_scaling_factor": 2.5}),
    ],
)
def test_one_device_is_the_model_and_no_relative_of_it(
    variant: str, change: dict[str, Any], checkpoint: Checkpoints, transformers_model: Callable[[str], Any]
) -> None:
    """Both oracles, and as a negative control one of them as another member of the family with the same weights."""
    path = checkpoint(variant)[1]
    model, _ = mla.load(path, dtype="float32")
    driver, tokens = Driver(model), prompts(model.config.vocab_size, (33,))[0]
    got = driver.step([(driver.request(), tokens)])[0]

    def error(want: np.ndarray) -> float:
        return float(np.abs(got - want).max() / np.abs(want).max())

    assert error(hf_logits(transformers_model(variant), tokens)[-1]) < 1e-4
    weights = read_weights(path)
    assert error(reference(model.config, weights, tokens).logits[-1]) < 1e-5
    other = dataclasses.replace(model.config, **change)
    assert error(reference(other, weights, tokens).logits[-1]) > 1e-2


@pytest.mark.parametrize("spread", [1, 100])
@pytest.mark.parametrize("method", SOFTMAX)
def test_softmax_routers_are_those_of_transformers(method: str, spread: float) -> None:
    """Weights expert by expert: logits may be so far apart that chosen scores are 0, and then any expert may be chosen.

    transformers masks the scores of other groups with 0, `route` with -inf: the same, also where kept ones are 0.
    """
    rng = np.random.default_rng(0)
    x, router = (rng.normal(size=s).astype(np.float32) for s in [(200, 64), (64, 8)])
    router *= spread / 8

    def by_expert(expert: np.ndarray, weight: np.ndarray) -> np.ndarray:
        assert all(len(set(row)) == 3 for row in expert)
        out = np.zeros((len(x), 8), np.float32)
        np.put_along_axis(out, expert, weight, axis=1)
        return out

    def ours(method: str) -> np.ndarray:
        config = dataclasses.replace(CONFIG, norm_topk_prob=False, experts_per_token=3, **SOFTMAX[method])
        return by_expert(*map(np.asarray, route(x, router, None, config)))

    gate = DeepseekV2TopkRouter(
        DeepseekV2Config(
            hidden_size=64, n_routed_experts=8, num_experts_per_tok=3, routed_scaling_factor=2.5, **SOFTMAX[method]
        )
    )
    gate.weight.data.copy_(torch.from_numpy(router.T))
    with torch.no_grad():
        _, weight, expert = gate(torch.from_numpy(x))
    want = by_expert(expert.numpy(), weight.numpy())
    # A logit of some hundreds is rounded by more than 1e-5, which is an error of its score.
    rounding = 2.5 * float(np.finfo(np.float32).eps * np.abs(x @ router).max())
    np.testing.assert_allclose(ours(method), want, atol=max(1e-5, rounding))
    if spread == 100:
        assert ((want > 0).sum(1) < 3).any(), "chosen scores of 0 occur"
    else:  # negative control
        (other,) = SOFTMAX.keys() - {method}
        assert np.abs(ours(other) - want).max() > 0.1


@pytest.mark.parametrize("mesh", [None, "tp=2,cp=4", "dp=2,cp=3"])
def test_greedy_continuations(
    mesh: str | None, checkpoint: Checkpoints, transformers_model: Callable[[str], Any]
) -> None:
    """20 prompts, 64 tokens each, all in one batch: token for token what transformers generates one at a time."""
    config, path = checkpoint("v3")
    texts = prompts(config["vocab_size"], tuple(range(1, 100, 5)), seed=11)
    want = hf_generate(transformers_model("v3"), texts, 64)
    model, _ = mla.load(path, mesh=mla.make_mesh(mesh) if mesh else None, dtype="float32")
    driver = Driver(model, max_requests=20, max_model_len=192, chunk=1000)
    requests = [driver.request(i % driver.planner.shape.dp) for i in range(len(texts))]
    news = texts
    got: list[list[int]] = [[] for _ in texts]
    for _ in range(64):
        logits = driver.step(list(zip(requests, news, strict=True)))
        news = [[int(token)] for token in logits.argmax(-1)]
        for tokens, new in zip(got, news, strict=True):
            tokens += new
    assert got == [list(tokens) for tokens in want]


def test_bfloat16_runs_and_stays_close(checkpoint: Checkpoints) -> None:
    config, path = checkpoint("v3")
    texts = prompts(config["vocab_size"], (150, 9, 1, 33))
    results = []
    for dtype in ("float32", "bfloat16"):
        model, _ = mla.load(path, mesh=mla.make_mesh("tp=2,cp=2"), dtype=dtype)  # type: ignore[arg-type]
        assert {x.dtype.name for x in jax.tree.leaves(model.params)} == {dtype, "float32"}
        results.append(play(Driver(model), texts)[1][0])
    cosine = np.dot(*results) / np.linalg.norm(results[0]) / np.linalg.norm(results[1])
    assert cosine > 0.95
