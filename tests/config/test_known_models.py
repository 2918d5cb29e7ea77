"""Configs as their publishers write them, in the keys that matter: each loads, or is refused with the true reason."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from jax_mla_cp.config.errors import ConfigError
from jax_mla_cp.config.model import ModelConfig
from tests.helpers import quantize

SIZES: dict[str, Any] = {
    "vocab_size": 320,
    "hidden_size": 256,
    "intermediate_size": 256,
    "moe_intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "num_experts_per_tok": 4,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 128,
    "q_lora_rank": 128,
    "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 32,
    "v_head_dim": 32,
    "tie_word_embeddings": False,
}
YARN = {"type": "yarn", "factor": 40, "original_max_position_embeddings": 4096, "mscale": 1.0, "mscale_all_dim": 1.0}
V3 = SIZES | {
    "model_type": "deepseek_v3",
    "n_group": 4,
    "topk_group": 2,
    "routed_scaling_factor": 2.5,
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "norm_topk_prob": True,
    "max_position_embeddings": 163840,
    "rope_theta": 10000,
    "rope_scaling": YARN,
    "eos_token_id": 1,
}
K2 = V3 | {
    "model_type": "kimi_k2",
    "n_group": 1,
    "topk_group": 1,
    "routed_scaling_factor": 2.827,
    "max_position_embeddings": 262144,
    "rope_theta": 50000.0,
    "rope_scaling": YARN | {"factor": 64.0, "beta_fast": 1.0, "beta_slow": 1.0},
}
MOONLIGHT = K2 | {
    "model_type": "deepseek_v3",
    "q_lora_rank": None,
    "n_shared_experts": 2,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 8192,
    "rope_scaling": None,
}
GLM_FLASH = V3 | {
    "model_type": "glm4_moe_lite",
    "n_group": 1,
    "topk_group": 1,
    "routed_scaling_factor": 1.8,
    "qk_nope_head_dim": 48,
    "v_head_dim": 64,
    "max_position_embeddings": 202752,
    "rope_theta": 1000000,
    "rope_scaling": None,
    "partial_rotary_factor": 1.0,
    "num_nextn_predict_layers": 1,
    "rms_norm_eps": 1e-5,
}
LITE = V3 | {
    "model_type": "deepseek_v2",
    "q_lora_rank": None,
    "scoring_func": "softmax",
    "topk_method": "greedy",
    "n_group": 1,
    "topk_group": 1,
    "norm_topk_prob": False,
    "routed_scaling_factor": 1.0,
}

LOADED = {
    "deepseek_coder_v2_lite": (LITE, None, ""),
    "deepseek_v3_1": (V3 | {"quantization_config": quantize.FP8_CONFIG | {"scale_fmt": "ue8m0"}}, "fp8", ""),
    "kimi_k2_0905": (K2 | {"quantization_config": quantize.FP8_CONFIG}, "fp8", ""),
    "kimi_k2_thinking": (K2 | {"quantization_config": quantize.INT4_CONFIG}, "int4", ""),
    "kimi_k25": (
        {
            "model_type": "kimi_k25",
            "text_config": K2 | {"quantization_config": quantize.INT4_CONFIG},
            "vision_config": {},
        },
        "int4",
        "language_model.",
    ),
    "kimi_vl": ({"model_type": "kimi_vl", "text_config": MOONLIGHT, "vision_config": {}}, None, "language_model."),
    "moonlight": (MOONLIGHT, None, ""),
    "glm_4_7_flash": (GLM_FLASH, None, ""),
}


@pytest.mark.parametrize(("raw", "kind", "prefix"), LOADED.values(), ids=LOADED.keys())
def test_loaded(raw: dict[str, Any], kind: str | None, prefix: str) -> None:
    config = ModelConfig.from_hf(raw)
    text = raw.get("text_config", raw)
    assert (config.quantization and config.quantization.kind, config.weight_prefix) == (kind, prefix)
    assert config.rope.theta == text["rope_theta"] and config.rope.yarn == (text["rope_scaling"] is not None)
    assert config.q_lora_rank == text["q_lora_rank"] and config.num_moe_layers == 2


REFUSED = {
    "deepseek_v3_2": (
        V3 | {"model_type": "deepseek_v32", "index_topk": 2048, "index_n_heads": 64},
        "model_type='deepseek_v32', index_topk=2048, .*sparse attention",
    ),
    "glm_5": (V3 | {"model_type": "glm_moe_dsa"}, "model_type='glm_moe_dsa': the sparse attention of DeepSeek-V3.2"),
    "kimi_linear": (V3 | {"model_type": "kimi_linear"}, r"'kimi_linear' is not supported \(most .* linear attention\)"),
    "kimi_vl_without_text": ({"model_type": "kimi_vl"}, "model_type='kimi_vl' needs 'text_config'"),
    "another_wrapper": ({"model_type": ["kimi_vl"], "text_config": V3}, r"model_type=\['kimi_vl'\] is not supported"),
    "awq": (
        V3 | {"quantization_config": {"quant_method": "awq", "bits": 4, "group_size": 64, "version": "gemm"}},
        "quantization_config.quant_method='awq': AWQ is not supported; .*Use the model's original checkpoint",
    ),
    "gptq": (V3 | {"quantization_config": {"quant_method": "gptq", "bits": 4}}, "GPTQ is not supported; .* Use"),
    "nvfp4": (
        V3 | {"quantization_config": {"quant_method": "modelopt", "quant_algo": "NVFP4"}},
        "quant_method='modelopt': NVFP4 of NVIDIA's Model Optimizer is not supported; .* Use",
    ),
    "nvfp4_older": (V3 | {"quantization_config": {"quant_method": "modelopt_fp4"}}, "NVFP4 of NVIDIA's Model Optimizer"),
    "nvfp4_of_llm_compressor": (
        V3 | {"quantization_config": quantize.INT4_CONFIG | {"format": "nvfp4-pack-quantized"}},
        "format='nvfp4-pack-quantized': NVFP4 is not supported; .* Use",
    ),
    "mlx": (V3 | {"quantization": {"group_size": 64, "bits": 4}}, "quantization: MLX is not supported; .* Use"),
    "mlx_twice": (V3 | {"quantization_config": {"group_size": 64, "bits": 4}}, "quantization_config: MLX is not"),
    "unknown": (V3 | {"quantization_config": {"quant_method": "new"}}, "quant_method='new' is not supported"),
    "two_counts_of_experts": (V3 | {"num_local_experts": 16}, "n_routed_experts=8, num_local_experts=16: .* differ"),
    "two_counts_of_mtp": (
        V3 | {"num_nextn_predict_layers": 1, "num_mtp_layers": 0},
        "num_nextn_predict_layers=1, num_mtp_layers=0: .* differ",
    ),
    "two_quantizations": (
        {
            "model_type": "kimi_k25",
            "text_config": K2 | {"quantization_config": quantize.INT4_CONFIG},
            "quantization_config": quantize.FP8_CONFIG,
        },
        "quantization_config=.*, text_config.quantization_config=.*: these mean the same, but differ",
    ),
    "dense_layers_in_between": (
        GLM_FLASH | {"mlp_layer_types": ["sparse", "dense", "sparse"]},
        "mlp_layer_types must be 3 times 'dense' or 'sparse', the dense ones first",
    ),
    "two_counts_of_dense_layers": (
        GLM_FLASH | {"mlp_layer_types": ["dense", "dense", "sparse"]},
        "'dense' in mlp_layer_types=2, first_k_dense_replace=1: .* differ",
    ),
    "an_end_beyond_the_vocabulary": (V3 | {"eos_token_id": [1, 320]}, "eos_token_id must be below vocab_size=320, got 320"),
    "an_end_that_is_no_id": (V3 | {"eos_token_id": True}, "eos_token_id must be a token id"),
}  # fmt: skip


@pytest.mark.parametrize(("raw", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_refused(raw: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ModelConfig.from_hf(raw)


def test_glm_without_a_count_of_dense_layers_has_one() -> None:
    """As in transformers' Glm4MoeLiteConfig, and so its eps."""
    missing = {k: v for k, v in GLM_FLASH.items() if k not in ("first_k_dense_replace", "rms_norm_eps")}
    given = missing | {"mlp_layer_types": ["dense", "sparse", "sparse"]}
    assert ModelConfig.from_hf(missing) == ModelConfig.from_hf(given) == ModelConfig.from_hf(GLM_FLASH)


def test_model_optimizer_is_told_by_its_own_file(tmp_path: Path) -> None:
    """config.json of such checkpoints may say nothing."""
    (tmp_path / "config.json").write_text(json.dumps(V3))
    algorithm: Any
    for algorithm in ("NVFP4", "FP8", "W4A8_AWQ"):
        file = {"producer": {"name": "modelopt"}, "quantization": {"quant_algo": algorithm, "group_size": 16}}
        (tmp_path / "hf_quant_config.json").write_text(json.dumps(file))
        with pytest.raises(
            ConfigError, match=f"hf_quant_config.json: quant_algo='{algorithm}': {algorithm} of NVIDIA's .* Use"
        ):
            ModelConfig.from_dir(tmp_path)
    (tmp_path / "hf_quant_config.json").write_text(json.dumps({"quantization": {"quant_algo": None}}))
    assert ModelConfig.from_dir(tmp_path).quantization is None
    (tmp_path / "hf_quant_config.json").write_text("{")
    with pytest.raises(ConfigError, match=r"hf_quant_config.json: not readable as JSON"):
        ModelConfig.from_dir(tmp_path)


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935c943f9e0ff69d22\nsize 12345\n"


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "hf_quant_config.json"])
def test_git_lfs_pointers_are_called_that(tmp_path: Path, name: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps(V3))
    ModelConfig.from_dir(tmp_path)
    (tmp_path / name).write_text(POINTER)
    with pytest.raises(ConfigError, match=rf"{name}: a Git LFS pointer, .* Run `git lfs pull` in {tmp_path}\."):
        ModelConfig.from_dir(tmp_path)


def test_end_tokens_of_both_parts_of_a_multimodal_config() -> None:
    raw = {"model_type": "kimi_vl", "text_config": MOONLIGHT | {"eos_token_id": 7}, "eos_token_id": [9, 7]}
    assert ModelConfig.from_hf(raw).eos_token_ids == (9, 7)
