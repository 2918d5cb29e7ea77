"""Hugging Face's config.json -> `ModelConfig`: its keys, their older and newer spellings, and what is refused."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jax_mla_cp.config import ConfigError, ModelConfig, RopeConfig, TopkMethod
from jax_mla_cp.quantization import Quantization

# What this package implements, for the keys whose other values would change the model's arithmetic.
_ONLY: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "moe_layer_freq": (1,),
}

_TEXT_MODELS = ("deepseek_v2", "deepseek_v3", "kimi_k2")

# The scores that each way of choosing experts is defined for, by DeepSeek's modeling files and transformers.
_SCORING: dict[TopkMethod, str] = {"noaux_tc": "sigmoid", "greedy": "softmax", "group_limited_greedy": "softmax"}


def read_directory(directory: Path) -> ModelConfig:
    """`ModelConfig.from_dir`."""
    path = directory / "config.json"
    raw = _read_json(path, required=True)
    generation = _read_json(path.with_name("generation_config.json"), required=False)
    config = read(raw)
    eos = dict.fromkeys(config.eos_token_ids + _token_ids(generation.get("eos_token_id"), "eos_token_id"))
    return dataclasses.replace(config, eos_token_ids=tuple(eos))


def read(raw: Mapping[str, Any]) -> ModelConfig:
    """`ModelConfig.from_hf`."""
    raw, weight_prefix = _text_part(raw)
    _refuse_unsupported(raw)

    def need(key: str) -> Any:
        if raw.get(key) is None:
            raise ConfigError(f"config.json: the key {key!r} is missing.")
        return raw[key]

    experts = raw.get("n_routed_experts", raw.get("num_local_experts")) or 0
    topk_method = _topk_method(raw)
    grouped = experts and topk_method != "greedy"  # which ignores the groups that a config may name
    return ModelConfig(
        vocab_size=need("vocab_size"),
        hidden_size=need("hidden_size"),
        num_layers=need("num_hidden_layers"),
        num_heads=need("num_attention_heads"),
        q_lora_rank=raw.get("q_lora_rank"),
        kv_lora_rank=need("kv_lora_rank"),
        qk_rope_head_dim=need("qk_rope_head_dim"),
        qk_nope_head_dim=need("qk_nope_head_dim"),
        v_head_dim=need("v_head_dim"),
        intermediate_size=need("intermediate_size"),
        first_k_dense=raw.get("first_k_dense_replace") or 0,
        moe_intermediate_size=need("moe_intermediate_size") if experts else 0,
        n_routed_experts=experts,
        n_shared_experts=raw.get("n_shared_experts") or 0,
        experts_per_token=need("num_experts_per_tok") if experts else 0,
        n_group=need("n_group") if grouped else 1,
        topk_group=need("topk_group") if grouped else 1,
        norm_topk_prob=bool(raw.get("norm_topk_prob", topk_method == "noaux_tc")),
        routed_scaling_factor=float(need("routed_scaling_factor")) if experts else 1.0,
        rms_norm_eps=float(raw.get("rms_norm_eps", 1e-6)),
        max_position=need("max_position_embeddings"),
        rope=_rope(raw),
        topk_method=topk_method,
        tie_word_embeddings=bool(raw.get("tie_word_embeddings", False)),
        num_mtp_layers=raw.get("num_nextn_predict_layers") or raw.get("num_mtp_layers") or 0,
        bos_token_id=raw.get("bos_token_id"),
        eos_token_ids=_token_ids(raw.get("eos_token_id"), "eos_token_id"),
        weight_prefix=weight_prefix,
        quantization=_quantization(raw),
    )


def _text_part(raw: Mapping[str, Any]) -> tuple[Mapping[str, Any], str]:
    """The text model's own keys, and what its tensors' names begin with."""
    if raw.get("model_type") != "kimi_k25":
        return raw, ""
    text = raw.get("text_config")
    if not isinstance(text, Mapping):
        raise ConfigError(
            "config.json: model_type='kimi_k25' needs 'text_config', an object with the text model's keys, "
            f"got {text!r}. This version runs the text part alone."
        )
    outside = {key: raw.get(key) for key in ("bos_token_id", "eos_token_id", "quantization_config")}
    return outside | {key: value for key, value in text.items() if value is not None}, "language_model."


def _refuse_unsupported(raw: Mapping[str, Any]) -> None:
    indexer = {key: value for key, value in raw.items() if key.startswith("index_") and value is not None}
    if indexer or raw.get("model_type") == "deepseek_v32":
        seen = {"model_type": raw.get("model_type")} | indexer
        listed = ", ".join(f"{key}={value!r}" for key, value in seen.items())
        raise ConfigError(
            f"config.json: {listed}: the sparse attention of DeepSeek-V3.2, whose indexer picks the tokens that a query "
            "sees, is not supported; this version runs attention over all tokens (DeepSeek-V2, V3, R1, Kimi K2)."
        )
    model_types = f"{', '.join(map(repr, _TEXT_MODELS))}, and 'kimi_k25' around one of them"
    if raw.get("model_type") is None:
        raise ConfigError(f"config.json: the key 'model_type' is missing; this version runs {model_types}.")
    if raw["model_type"] not in _TEXT_MODELS:
        raise ConfigError(
            f"config.json: model_type={raw['model_type']!r} is not supported; this version runs {model_types}."
        )
    for key, allowed in _ONLY.items():
        got = raw.get(key)
        if got is not None and got not in allowed:
            can = " or ".join(repr(a) for a in allowed)
            raise ConfigError(f"config.json: {key}={got!r} is not supported; this version runs {can}.")


def _topk_method(raw: Mapping[str, Any]) -> TopkMethod:
    # transformers 5 leaves both keys out where its class for the model has one way only.
    v2 = raw["model_type"] == "deepseek_v2"
    method = raw.get("topk_method") or ("greedy" if v2 else "noaux_tc")
    scoring = raw.get("scoring_func") or ("softmax" if v2 else "sigmoid")
    for known, score in _SCORING.items():
        if (method, scoring) == (known, score):
            return known
    can = ", ".join(f"{score} with {known}" for known, score in _SCORING.items())
    raise ConfigError(
        f"config.json: scoring_func={scoring!r} with topk_method={method!r} is not supported; this version runs {can}."
    )


def _quantization(raw: Mapping[str, Any]) -> Quantization | None:
    try:
        return Quantization.from_hf(raw.get("quantization_config"))
    except ValueError as error:
        raise ConfigError(f"config.json: {error}") from None


def _rope(raw: Mapping[str, Any]) -> RopeConfig:
    # transformers 5 writes rope_parameters, 4 writes rope_theta and rope_scaling; the same numbers.
    new = dict(raw.get("rope_parameters") or {})
    old = dict(raw.get("rope_scaling") or {})
    scaling = new or old
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind not in ("default", "yarn"):
        raise ConfigError(f"config.json: rope type {kind!r} is not supported; this version runs 'default' and 'yarn'.")
    theta = float(new.get("rope_theta", raw.get("rope_theta", 10000.0)))
    interleaved = bool(raw.get("rope_interleave", True))
    if kind == "default":
        return RopeConfig(theta=theta, interleaved=interleaved)
    if scaling.get("attention_factor") is not None or scaling.get("truncate") is False:
        raise ConfigError("config.json: rope_scaling with attention_factor or truncate=false is not supported.")
    original = scaling.get("original_max_position_embeddings")
    if original is None:
        raise ConfigError("config.json: YaRN needs rope_scaling.original_max_position_embeddings.")
    return RopeConfig(
        theta=theta,
        factor=float(scaling.get("factor") or raw["max_position_embeddings"] / original),
        original_max_position=int(original),
        beta_fast=float(scaling.get("beta_fast") or 32),
        beta_slow=float(scaling.get("beta_slow") or 1),
        mscale=float(scaling.get("mscale") or 0),
        mscale_all_dim=float(scaling.get("mscale_all_dim") or 0),
        yarn=True,
        interleaved=interleaved,
    )


def _token_ids(value: Any, key: str) -> tuple[int, ...]:
    ids = [] if value is None else value if isinstance(value, list) else [value]
    if not all(isinstance(i, int) and i >= 0 for i in ids):
        raise ConfigError(f"{key} must be a token id or a list of them, got {value!r}.")
    return tuple(ids)


def _read_json(path: Path, *, required: bool) -> dict[str, Any]:
    if not path.is_file():
        if not required:
            return {}
        what = "is not a directory" if not path.parent.is_dir() else "has no config.json"
        raise ConfigError(f"--model {path.parent}: {what}. Give a Hugging Face model directory.")
    try:
        raw = json.loads(path.read_text())
    except (ValueError, OSError) as error:
        raise ConfigError(f"{path}: not readable as JSON: {error}") from error
    if not isinstance(raw, dict):
        raise ConfigError(f"{path}: expected a JSON object, got {type(raw).__name__}.")
    return raw
