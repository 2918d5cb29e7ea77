"""config.json in both styles, and what is refused before any device work."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import pytest

import jax_mla_cp as mla
from jax_mla_cp.config import presets
from jax_mla_cp.config.errors import ConfigError
from jax_mla_cp.config.model import ModelConfig
from jax_mla_cp.launch import plan_build
from jax_mla_cp.mesh import MeshShape
from jax_mla_cp.model.build import EP_CHOICES, Build
from jax_mla_cp.model.loaded_model import weight_bytes
from jax_mla_cp.step.cache_sizing import create_runner
from tests.helpers.checkpoints import BASE, old_style
from tests.helpers.synthetic import CONFIG, random_model


def raw(**change: Any) -> dict[str, Any]:
    return {"model_type": "deepseek_v3", **BASE, **change}


def test_both_styles_read_the_same() -> None:
    assert ModelConfig.from_hf(old_style(raw(dtype="float32"))) == ModelConfig.from_hf(raw())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "llama"}, "model_type='llama' is not supported"),
        ({"model_type": None}, "'model_type' is missing"),
        ({"model_type": "deepseek_vl_v2", "text_config": {}}, "model_type='deepseek_vl_v2' is not supported"),
        ({"model_type": "deepseek_v32"}, "model_type='deepseek_v32': the sparse attention of DeepSeek-V3.2"),
        ({"index_topk": 2048, "index_n_heads": 64}, "index_topk=2048, index_n_heads=64: the sparse attention"),
        ({"model_type": "kimi_k25"}, "needs 'text_config', .* got None"),
        ({"model_type": "kimi_k25", "text_config": {"model_type": "kimi_linear"}}, "model_type='kimi_linear' is not"),
        ({"hidden_size": None}, "'hidden_size' is missing"),
        (
            {"scoring_func": "softmax"},
            "scoring_func='softmax' with topk_method='noaux_tc' is not .* softmax with greedy",
        ),
        ({"topk_method": "greedy"}, "scoring_func='sigmoid' with topk_method='greedy' is not"),
        ({"scoring_func": "sqrtsoftplus"}, "scoring_func='sqrtsoftplus'"),
        ({"model_type": "deepseek_v2", "scoring_func": "sigmoid"}, "scoring_func='sigmoid' with topk_method='greedy'"),
        ({"model_type": "deepseek_v2"}, "norm_topk_prob=true with topk_method='greedy' is not supported"),
        ({"moe_layer_freq": 2}, "moe_layer_freq=2"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"n_group": None}, "'n_group' is missing"),
        ({"attention_bias": True}, "attention_bias"),
        ({"quantization_config": {"quant_method": "fp8"}}, "weight_block_size=None"),
        ({"n_group": 3}, "multiple of n_group=3"),
        ({"topk_group": 5}, "topk_group must be 1 to n_group=4"),
        ({"num_experts_per_tok": 5}, "num_experts_per_tok must be 1 to 4"),
        ({"qk_rope_head_dim": 7}, "qk_rope_head_dim must be even"),
        ({"rope_parameters": {"rope_type": "llama3"}}, "rope type 'llama3'"),
        ({"eos_token_id": "x"}, "eos_token_id must be a token id"),
        ({"bos_token_id": "x"}, "bos_token_id must be a token id"),
        ({"hidden_size": "64"}, "hidden_size must be a whole number, 0 or more, got '64'"),
        ({"num_hidden_layers": 3.0}, "num_hidden_layers must be a whole number"),
        ({"first_k_dense_replace": -1}, "first_k_dense_replace must be a whole number"),
        ({"q_lora_rank": 0}, "q_lora_rank must be at least 1, or null"),
        ({"moe_intermediate_size": 0}, "moe_intermediate_size must be at least 1"),
        ({"norm_topk_prob": "false"}, "norm_topk_prob must be true or false, got 'false'"),
        ({"tie_word_embeddings": 1}, "tie_word_embeddings must be true or false"),
        ({"routed_scaling_factor": float("nan")}, "routed_scaling_factor must be a number"),
        ({"rope_parameters": "yarn"}, "rope_parameters must be an object"),
        ({"rope_parameters": {"rope_theta": 0}}, "rope_theta must be above 0"),
        ({"rope_scaling": {"type": "yarn", "factor": 8.0}}, "rope_parameters and rope_scaling differ in factor"),
        ({"quantization_config": "fp8"}, "quantization_config must be an object"),
    ],
)
def test_configs_that_cant_run(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ModelConfig.from_hf(raw(**change))


def test_null_is_no_key() -> None:
    """As Python writes a default that nobody has set."""
    missing = {key: value for key, value in raw().items() if key not in ("rms_norm_eps", "norm_topk_prob")}
    nulls = {"rms_norm_eps": None, "norm_topk_prob": None, "rope_scaling": None, "tie_word_embeddings": None}
    assert ModelConfig.from_hf(raw(**nulls)) == ModelConfig.from_hf(missing)


def test_both_spellings_of_rope_may_say_the_same() -> None:
    same = dict(raw()["rope_parameters"])
    same["type"] = same.pop("rope_type")
    assert ModelConfig.from_hf(raw(rope_scaling=same)) == ModelConfig.from_hf(raw())


def test_deepseek_v2_routes_by_its_own_keys() -> None:
    v2 = raw(model_type="deepseek_v2", norm_topk_prob=False, topk_method="group_limited_greedy", num_experts_per_tok=3)
    read = ModelConfig.from_hf(v2)
    assert (read.topk_method, read.n_group, read.topk_group, read.routing_bias) == ("group_limited_greedy", 4, 2, False)
    assert ModelConfig.from_hf(v2 | {"scoring_func": "softmax"}) == read
    lite = ModelConfig.from_hf(v2 | {"topk_method": "greedy"})  # whose groups mean nothing: five experts may be chosen
    assert (lite.topk_method, lite.n_group, lite.topk_group) == ("greedy", 1, 1)
    assert ModelConfig.from_hf(v2 | {"topk_method": "greedy", "num_experts_per_tok": 5}).experts_per_token == 5
    with pytest.raises(ConfigError, match="num_experts_per_tok must be 1 to 4"):
        ModelConfig.from_hf(v2 | {"num_experts_per_tok": 5})
    singles = ModelConfig.from_hf(v2 | {"n_group": 8, "topk_group": 3})  # a group's score is one expert's
    assert singles.n_group == singles.n_routed_experts
    with pytest.raises(ConfigError, match="topk_method='greedy' does not use expert groups: n_group must be 1, got 4"):
        dataclasses.replace(read, topk_method="greedy")


def test_the_text_part_of_kimi_k25() -> None:
    text = old_style(raw(dtype="float32", model_type="kimi_k2", rms_norm_eps=1e-5))
    alone = ModelConfig.from_hf(text)
    wrapped = {"model_type": "kimi_k25", "text_config": text, "vision_config": {"hidden_size": 1}, "rms_norm_eps": 1e-6}
    assert ModelConfig.from_hf(wrapped) == dataclasses.replace(alone, weight_prefix="language_model.")
    del text["eos_token_id"]
    assert ModelConfig.from_hf(wrapped | {"eos_token_id": 7}).eos_token_ids == (7,)
    quantized = {"quantization_config": {"quant_method": "compressed-tensors"}}
    for place in (wrapped | quantized, wrapped | {"text_config": text | quantized}):  # the published file: inside
        with pytest.raises(ConfigError, match="quantization_config"):
            ModelConfig.from_hf(place)


def test_published_configs() -> None:
    """Particulars of each, from the configs that ship."""
    lite, v2, v3, k2, k25 = map(
        presets.model_config, ("deepseek_v2_lite", "deepseek_v2", "deepseek_v3", "kimi_k2", "kimi_k25")
    )
    assert [c.topk_method for c in (lite, v2, v3)] == ["greedy", "group_limited_greedy", "noaux_tc"]
    assert (lite.q_lora_rank, lite.n_group, v2.n_group, v2.topk_group, v2.routed_scaling_factor) == (None, 1, 8, 3, 16)
    # YaRN's temperature squared: 0.0707 ln 40 + 1 and 0.1 ln 40 + 1; cos and sin are not scaled in either.
    assert lite.softmax_scale == pytest.approx(192**-0.5 * 1.26080**2, rel=1e-5) == v2.softmax_scale
    assert v3.softmax_scale == pytest.approx(192**-0.5 * 1.36889**2, rel=1e-5)
    assert {c.rope.amplitude for c in (lite, v2, v3, k2, k25)} == {1.0}
    assert (k2.num_heads, k2.n_routed_experts, k2.rope.beta_fast, k2.rope.factor) == (64, 384, 1, 32)
    assert (k25.rope.beta_fast, k25.rope.factor, k25.rms_norm_eps, k25.max_position) == (32, 64, 1e-5, 262144)


def test_stop_tokens_are_the_union(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(raw(eos_token_id=[1, 5])))
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [5, 9]}))
    assert ModelConfig.from_dir(tmp_path).eos_token_ids == (1, 5, 9)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ConfigError, match="not readable as JSON"):
        ModelConfig.from_dir(tmp_path)


@pytest.mark.parametrize("text", ["tp=8,cp=4,dp=2", "dp=2,tp=8,cp=4", " cp=4, dp=2 ,tp=8"])
def test_meshes_in_any_order(text: str) -> None:
    assert MeshShape.parse(text) == MeshShape(dp=2, cp=4, tp=8)
    assert str(MeshShape.parse("tp=8,cp=4")) == "tp=8,cp=4"


def test_a_mesh_that_does_not_multiply_out() -> None:
    with pytest.raises(
        ConfigError, match=r"mesh: cp=8 and tp=8 need 64 devices, found 32 \(cpu\)\. Use mesh='tp=8,cp=4', or"
    ):
        mla.make_mesh("tp=8,cp=8")


def test_tp_must_divide() -> None:
    with pytest.raises(ConfigError, match=r"num_attention_heads=8, got tp=3\. Use tp=2, and cp"):
        Build(CONFIG, MeshShape(tp=3))
    with pytest.raises(ConfigError, match="intermediate_size=100"):
        Build(dataclasses.replace(CONFIG, intermediate_size=100), MeshShape(tp=8))


def test_what_tp_need_not_divide_is_padded() -> None:
    build = Build(dataclasses.replace(CONFIG, n_routed_experts=4, n_group=1, topk_group=1), MeshShape(tp=8, cp=2))
    assert build.padded_vocab == 256
    assert build.padded_experts == 8
    wide = dataclasses.replace(build, ep_axes=EP_CHOICES["tp,cp"])
    assert wide.padded_experts == 16


def test_fewer_experts_than_devices_run_on_a_part_of_the_mesh() -> None:
    from tests.helpers.synthetic import Driver
    from tests.step.test_forward import play

    config = dataclasses.replace(CONFIG, n_routed_experts=4, n_group=1, topk_group=1)
    want = play(Driver(random_model(config=config)))[0]
    got = play(Driver(random_model("tp=4,cp=2", "tp,cp", config=config)))[0]
    assert abs(got - want).max() < 1e-5 * abs(want).max()


def test_auto_ep_takes_the_fewest_axes_that_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    config = presets.model_config("deepseek_v3")
    mesh = mla.make_mesh("dp=2,tp=8,cp=2")
    sizes = {
        name: weight_bytes(Build(config, MeshShape(2, 2, 8), axes, jnp.dtype(jnp.bfloat16)))
        for name, axes in EP_CHOICES.items()
    }
    assert sizes["tp"] > sizes["tp,cp"] > sizes["tp,cp,dp"]
    for wanted, room in (
        ("tp", sizes["tp"]),
        ("tp,cp", sizes["tp,cp"]),
        ("tp,cp,dp", sizes["tp,cp,dp"]),
        ("tp,cp,dp", 1),
    ):
        monkeypatch.setattr("jax_mla_cp.platform.device_memory", lambda room=room: room / 0.69)
        build = plan_build(config, mesh, dtype="bfloat16", ep_axes="auto", attention="auto")
        assert build.ep_axes == EP_CHOICES[wanted]


RUNNER: dict[str, Any] = {
    "page_size": 16,
    "kv_pages": None,
    "memory_fraction": 0.9,
    "prefill_chunk": 64,
    "max_model_len": None,
    "max_running": 2,
}


def test_the_cache_is_sized_by_memory_and_by_use(monkeypatch: pytest.MonkeyPatch) -> None:
    model = random_model("tp=2,cp=2")
    runner = create_runner(model, **RUNNER)
    assert (runner.pages_per_group, runner.max_model_len) == (2 * 512 // 16, 512), "no more than could be used"
    page = 3 * 16 * 40 * 4
    monkeypatch.setattr("jax_mla_cp.platform.device_memory", lambda: 3_000_000)
    small = create_runner(model, **RUNNER)
    assert small.pages_per_group * page < 0.9 * 3_000_000
    with pytest.raises(ConfigError, match=r"kv_pages: must be at most \d+, got 5000: that many pages of 16 tokens"):
        create_runner(model, **RUNNER | {"kv_pages": 5000})
    with pytest.raises(ConfigError, match="3 pages of 16 hold 48 tokens"):
        create_runner(model, **RUNNER | {"kv_pages": 3, "max_model_len": 49})
    assert create_runner(model, **RUNNER | {"kv_pages": 3}).max_model_len == 48
    monkeypatch.setattr("jax_mla_cp.platform.device_memory", lambda: 1000)
    with pytest.raises(ConfigError, match="no room for a single page"):
        create_runner(model, **RUNNER)
