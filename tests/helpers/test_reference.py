"""The float64 reference agrees with transformers to rounding, and would not if any one thing of it were different."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer

from jax_mla_cp.config.model import ModelConfig
from tests.helpers import reference
from tests.helpers.checkpoints import (
    VARIANTS,
    hf_cache,
    hf_generate,
    hf_logits,
    hf_model,
    make_checkpoint,
    read_weights,
)

Checkpoint = Callable[[str], tuple[dict[str, Any], Path]]

TOLERANCE = 1e-9
"""Relative to the largest value. Both sides compute in float64 and differ by about 2e-15; float32 anywhere would give 1e-7."""

LENGTH = 160
"""Enough for every expert to be chosen by some token, in every layer."""


@dataclasses.dataclass
class Case:
    config: ModelConfig
    weights: dict[str, np.ndarray]
    tokens: np.ndarray
    expected: np.ndarray
    """transformers' float64 logits, [S, V]"""

    def error(self, config: ModelConfig | None = None, weights: dict[str, np.ndarray] | None = None) -> float:
        got = reference.forward(config or self.config, weights or self.weights, self.tokens).logits
        return _relative(got, self.expected)


@pytest.fixture(scope="module")
def case(checkpoint: Checkpoint) -> Callable[[str], Case]:
    cases: dict[str, Case] = {}

    def get(name: str) -> Case:
        if name not in cases:
            path = checkpoint(name)[1]
            config = ModelConfig.from_dir(path)
            tokens = np.random.default_rng(1).integers(0, config.vocab_size, LENGTH)
            expected = hf_logits(hf_model(path, float64=True), tokens)
            cases[name] = Case(config, read_weights(path), tokens, expected)
        return cases[name]

    return get


def _relative(got: np.ndarray, expected: np.ndarray) -> float:
    assert got.shape == expected.shape
    return float(np.abs(got - expected).max() / np.abs(expected).max())


@pytest.mark.parametrize("name", VARIANTS)
def test_agrees_with_transformers(case: Callable[[str], Case], checkpoint: Checkpoint, name: str) -> None:
    c = case(name)
    assert c.expected.dtype == np.float64
    result = reference.forward(c.config, c.weights, c.tokens)
    assert _relative(result.logits, c.expected) < TOLERANCE
    cache = hf_cache(hf_model(checkpoint(name)[1], float64=True), c.tokens)
    assert _relative(result.latents, np.stack([np.concatenate(layer, -1) for layer in cache])) < TOLERANCE
    assert result.hidden.shape == (c.config.num_layers + 1, LENGTH, c.config.hidden_size)


@pytest.mark.parametrize("name", ["v3", "one_group", "no_q_lora"])
def test_agrees_with_float32_transformers(
    case: Callable[[str], Case], transformers_model: Callable[[str], Any], name: str
) -> None:
    # Unpatched: shows that `in_float64` changes transformers' precision and nothing else.
    c = case(name)
    got = hf_logits(transformers_model(name), c.tokens)
    assert got.dtype == np.float32
    assert 1e-9 < _relative(got, c.expected) < 1e-5
    latents = np.stack([np.concatenate(layer, -1) for layer in hf_cache(transformers_model(name), c.tokens)])
    assert _relative(latents, reference.forward(c.config, c.weights, c.tokens).latents) < 1e-5


def test_long_sequence(case: Callable[[str], Case], checkpoint: Checkpoint) -> None:
    # Beyond the original context of 256, where YaRN's blend matters most.
    c = case("v3")
    tokens = np.random.default_rng(2).integers(0, c.config.vocab_size, 700)
    expected = hf_logits(hf_model(checkpoint("v3")[1], float64=True), tokens)
    assert _relative(reference.forward(c.config, c.weights, tokens).logits, expected) < TOLERANCE


def test_is_causal(case: Callable[[str], Case]) -> None:
    c = case("v3")
    short, long = (reference.forward(c.config, c.weights, c.tokens[:n]) for n in (LENGTH // 2, LENGTH))
    assert _relative(long.logits[: LENGTH // 2], short.logits) < 1e-12
    np.testing.assert_array_equal(long.experts[:, : LENGTH // 2], short.experts)


def _rope(**changes: Any) -> Callable[[ModelConfig], ModelConfig]:
    return lambda c: dataclasses.replace(c, rope=dataclasses.replace(c.rope, **changes))


def _config(**changes: Any) -> Callable[[ModelConfig], ModelConfig]:
    return lambda c: dataclasses.replace(c, **changes)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        pytest.param("v3", _config(rms_norm_eps=1e-5), id="eps"),
        pytest.param("v3", _config(norm_topk_prob=False), id="norm_topk_prob"),
        pytest.param("v3", _config(routed_scaling_factor=2.4), id="routed_scaling_factor"),
        pytest.param("v3", _config(n_group=1, topk_group=1), id="no_groups"),
        pytest.param("v3", _config(topk_group=3), id="topk_group"),
        pytest.param("v3", _config(experts_per_token=3), id="experts_per_token"),
        pytest.param("v3", _config(n_shared_experts=0), id="no_shared_experts"),
        pytest.param("v3", _rope(interleaved=False), id="rope_order"),
        pytest.param("rope_halves", _rope(interleaved=True), id="rope_order_reversed"),
        pytest.param("v3", _rope(yarn=False), id="no_yarn"),
        pytest.param("v3", _rope(mscale_all_dim=0.5), id="mscale_all_dim"),
        pytest.param("no_q_lora", _rope(mscale=0.5), id="mscale"),
        pytest.param("one_group", _rope(beta_fast=32.0), id="beta_fast"),
        pytest.param("one_group", _rope(theta=10000.0), id="theta"),
        pytest.param("v3", _rope(factor=4.1), id="factor"),
        pytest.param("v2", _config(topk_method="greedy", n_group=1, topk_group=1), id="v2_greedy"),
        pytest.param("v2", _config(topk_group=1, experts_per_token=2), id="v2_topk_group"),
        pytest.param(
            "v2_lite", _config(topk_method="group_limited_greedy", n_group=4, topk_group=2), id="v2_lite_groups"
        ),
        pytest.param("v2_lite", _rope(mscale_all_dim=1.0), id="v2_lite_mscale_all_dim"),
        pytest.param("k25", _config(rms_norm_eps=1e-6), id="k25_eps"),
        pytest.param("k25", _rope(theta=10000.0), id="k25_theta"),
    ],
)
def test_control_config(case: Callable[[str], Case], name: str, change: Callable[[ModelConfig], ModelConfig]) -> None:
    c = case(name)
    assert c.error() < TOLERANCE
    assert c.error(config=change(c.config)) > 100 * TOLERANCE


def test_control_v2_group_scores(case: Callable[[str], Case], monkeypatch: pytest.MonkeyPatch) -> None:
    """A group's score in DeepSeek-V2 is its best expert's; the sum of two, as in V3, chooses other groups."""
    c = case("v2")
    best_two = dataclasses.replace(c.config, topk_method="noaux_tc")
    choose = reference.choose_experts
    monkeypatch.setattr(reference, "choose_experts", lambda config, scores: choose(best_two, scores))
    assert c.error() > 100 * TOLERANCE


def test_control_eps_of_compressed_norms(case: Callable[[str], Case], monkeypatch: pytest.MonkeyPatch) -> None:
    c = case("one_group")
    assert c.config.rms_norm_eps == 1e-5
    monkeypatch.setattr(reference, "LORA_NORM_EPS", c.config.rms_norm_eps)
    assert c.error() > 100 * TOLERANCE


def test_control_mask_with_zero(case: Callable[[str], Case], monkeypatch: pytest.MonkeyPatch) -> None:
    # What older code does to other groups' experts; it differs as soon as a biased score is negative.
    c = case("v3")
    monkeypatch.setattr(np, "inf", 0.0)
    assert c.error() > 100 * TOLERANCE


@pytest.mark.parametrize("name", ["v3", "no_q_lora", "two_groups", "tied", "v2"])
def test_control_every_tensor_counts(case: Callable[[str], Case], name: str) -> None:
    c = case(name)
    ignored = []
    # Noise, as the norm after q_a_proj undoes a common factor; and not of the weights' own seed: that gives the same
    # stream of numbers, so that where the two align the noise is a multiple of the weight.
    rng = np.random.default_rng(12345)
    for tensor, value in c.weights.items():
        # Correction biases act through a choice, so only a large change shows.
        bias = tensor.endswith("correction_bias")
        changed = value[::-1] if bias else value + 1e-3 * rng.normal(size=value.shape)
        if c.error(weights=c.weights | {tensor: changed}) < 100 * TOLERANCE:
            ignored.append(tensor)
    assert ignored == []


def test_attention_f64_against_torch() -> None:
    rng = np.random.default_rng(0)
    q, k, v = rng.normal(size=(5, 3, 8)), rng.normal(size=(9, 3, 8)), rng.normal(size=(9, 3, 4))
    q_pos = np.array([8, 0, 3, 3, 5])
    got = reference.attention_f64(q, k, v, q_pos, 0.3)
    mask = torch.from_numpy(np.arange(9) <= q_pos[:, None])
    tq, tk, tv = (torch.from_numpy(a).transpose(0, 1) for a in (q, k, v))
    expected = torch.nn.functional.scaled_dot_product_attention(tq, tk, tv, attn_mask=mask, scale=0.3).transpose(0, 1)
    np.testing.assert_allclose(got, expected.numpy(), rtol=0, atol=1e-14)
    assert np.abs(reference.attention_f64(q, k, v, q_pos - [1, 0, 0, 0, 0], 0.3) - got).max() > 1e-3

    shared = reference.attention_f64(q, k[:, 0], v[:, :1], q_pos, 0.3)
    repeated = reference.attention_f64(q, np.repeat(k[:, :1], 3, 1), np.repeat(v[:, :1], 3, 1), q_pos, 0.3)
    np.testing.assert_allclose(shared, repeated, rtol=0, atol=1e-14)


def test_attention_f64_edges() -> None:
    rng = np.random.default_rng(0)
    q, k, v = (rng.normal(size=(4, 2, 8)) for _ in range(3))
    k[3], v[3] = np.nan, np.nan
    out = reference.attention_f64(q, k, v, [0, 2, -1, 1], 1.0)
    assert np.isfinite(out).all()
    np.testing.assert_allclose(out[0], v[0], rtol=1e-15)
    np.testing.assert_array_equal(out[2], 0)
    with pytest.raises(ValueError, match=r"q_pos\[1\]=4 needs 5 keys, got 4"):
        reference.attention_f64(q, k, v, [0, 4, 0, 0], 1.0)


def test_biases_and_margins_are_useful(case: Callable[[str], Case]) -> None:
    c = case("v3")
    result = reference.forward(c.config, c.weights, c.tokens)
    bias = np.stack([v for n, v in c.weights.items() if n.endswith("correction_bias")])
    assert (bias < -0.5).any() and (bias > 0).any(), "biases of both signs, take another seed"
    assert all(len(np.unique(layer)) == c.config.n_routed_experts for layer in result.experts)
    assert result.router_margin.min() > 1e-5, "float32 rounding could choose other experts; take another seed"


def test_config_styles_agree(checkpoint: Checkpoint, transformers_model: Callable[[str], Any]) -> None:
    old, new = checkpoint("old_config")[0], checkpoint("v3")[0]
    assert {"rope_scaling", "rope_theta", "scoring_func", "topk_method"} <= set(old)
    assert "rope_parameters" in new and not {"rope_parameters", "dtype"} & set(old)
    tokens = np.arange(40)
    got, expected = (hf_logits(transformers_model(name), tokens) for name in ("old_config", "v3"))
    np.testing.assert_array_equal(got, expected)


def test_sharded_checkpoint_is_the_same(checkpoint: Checkpoint) -> None:
    path = checkpoint("sharded")[1]
    assert (path / "model.safetensors.index.json").exists() and len(list(path.glob("*.safetensors"))) > 2
    whole, parts = read_weights(checkpoint("v3")[1]), read_weights(path)
    assert whole.keys() == parts.keys()
    assert all(np.array_equal(whole[name], parts[name]) for name in whole)


def test_generate_is_greedy(case: Callable[[str], Case], transformers_model: Callable[[str], Any]) -> None:
    c = case("v3")
    prompts = [[5, 6, 7], c.tokens[:20].tolist()]
    for prompt, got in zip(prompts, hf_generate(transformers_model("v3"), prompts, 12), strict=True):
        assert len(got) == 12
        logits = reference.forward(c.config, c.weights, prompt + got).logits
        assert got == logits[len(prompt) - 1 : -1].argmax(-1).tolist()


@pytest.mark.parametrize("name", ["v3", "odd_vocab"])
def test_tokenizer(checkpoint: Checkpoint, name: str) -> None:
    raw, path = checkpoint(name)
    tokenizer = Tokenizer.from_file(str(path / "tokenizer.json"))
    text = "Zigzag, naïve — 日本語 🙂\n\tabc"
    ids = tokenizer.encode(text).ids
    assert tokenizer.decode(ids) == text
    assert max(ids) < raw["vocab_size"] and not {raw["bos_token_id"], raw["eos_token_id"]} & set(ids)
    assert tokenizer.get_vocab_size() == raw["vocab_size"]


def test_vocabulary_too_small(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="vocab_size=200 can't hold 256 bytes"):
        make_checkpoint(tmp_path, vocab_size=200)
