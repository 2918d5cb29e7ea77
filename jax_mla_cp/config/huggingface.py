"""Hugging Face's config.json -> the fields of `ModelConfig`: its keys, their older and newer spellings, and what is refused."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from jax_mla_cp.config.errors import ConfigError
from jax_mla_cp.config.quantization import Quantization
from jax_mla_cp.config.rope import RopeConfig

# What this package implements, for the keys whose other values would change the model's arithmetic.
_ONLY: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "moe_layer_freq": (1,),
}

TopkMethod = Literal["noaux_tc", "greedy", "group_limited_greedy"]

_TEXT_MODELS = ("deepseek_v2", "deepseek_v3", "kimi_k2")

# The scores that each way of choosing experts is defined for, by DeepSeek's modeling files and transformers.
_SCORING: dict[TopkMethod, str] = {"noaux_tc": "sigmoid", "greedy": "softmax", "group_limited_greedy": "softmax"}


def directory_fields(directory: Path) -> dict[str, Any]:
    """The fields of `ModelConfig.from_dir`: those of config.json, and the stop tokens of generation_config.json besides.

    Raises:
      ConfigError: as `ModelConfig.from_dir`.
    """
    path = directory / "config.json"
    raw = _read_json(path, required=True)
    generation = _read_json(path.with_name("generation_config.json"), required=False)
    found = fields(raw)
    more = _token_ids(generation.get("eos_token_id"), "eos_token_id", "generation_config.json")
    return found | {"eos_token_ids": tuple(dict.fromkeys(found["eos_token_ids"] + more))}


def fields(raw: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of `ModelConfig.from_hf`, each of its type. `ModelConfig` checks how they fit together.

    Raises:
      ConfigError: as `ModelConfig.from_hf`.
    """
    raw, weight_prefix = _text_part(raw)
    _refuse_unsupported(raw)

    keys = _Keys(raw)
    experts = keys.whole("n_routed_experts" if raw.get("n_routed_experts") is not None else "num_local_experts", 0)
    topk_method = _topk_method(raw)
    grouped = experts and topk_method != "greedy"  # which ignores the groups that a config may name
    return dict(
        vocab_size=keys.whole("vocab_size"),
        hidden_size=keys.whole("hidden_size"),
        num_layers=keys.whole("num_hidden_layers"),
        num_heads=keys.whole("num_attention_heads"),
        q_lora_rank=None if raw.get("q_lora_rank") is None else keys.whole("q_lora_rank"),
        kv_lora_rank=keys.whole("kv_lora_rank"),
        qk_rope_head_dim=keys.whole("qk_rope_head_dim"),
        qk_nope_head_dim=keys.whole("qk_nope_head_dim"),
        v_head_dim=keys.whole("v_head_dim"),
        intermediate_size=keys.whole("intermediate_size"),
        first_k_dense=keys.whole("first_k_dense_replace", 0),
        moe_intermediate_size=keys.whole("moe_intermediate_size") if experts else 0,
        n_routed_experts=experts,
        n_shared_experts=keys.whole("n_shared_experts", 0),
        experts_per_token=keys.whole("num_experts_per_tok") if experts else 0,
        n_group=keys.whole("n_group") if grouped else 1,
        topk_group=keys.whole("topk_group") if grouped else 1,
        norm_topk_prob=keys.flag("norm_topk_prob", topk_method == "noaux_tc"),
        routed_scaling_factor=keys.number("routed_scaling_factor") if experts else 1.0,
        rms_norm_eps=keys.number("rms_norm_eps", 1e-6),
        max_position=keys.whole("max_position_embeddings"),
        rope=_rope(keys),
        topk_method=topk_method,
        tie_word_embeddings=keys.flag("tie_word_embeddings", False),
        num_mtp_layers=keys.whole("num_nextn_predict_layers", 0) or keys.whole("num_mtp_layers", 0),
        bos_token_id=next(iter(_token_ids(raw.get("bos_token_id"), "bos_token_id")), None),
        eos_token_ids=_token_ids(raw.get("eos_token_id"), "eos_token_id"),
        weight_prefix=weight_prefix,
        quantization=_quantization(raw),
    )


@dataclasses.dataclass(frozen=True)
class _Keys:
    """The keys of an object in config.json, each read as what it must be: a "false" in quotes would be true to Python. null is
    no key. A key without a default must be there."""

    raw: Mapping[str, Any]

    def whole(self, key: str, default: int | None = None) -> int:
        value = self._get(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise ConfigError("config.json", f"{key} must be a whole number, 0 or more, got {value!r}.")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        value = self._get(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
            raise ConfigError("config.json", f"{key} must be a number, 0 or more, got {value!r}.")
        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        value = self._get(key, default)
        if not isinstance(value, bool):
            raise ConfigError("config.json", f"{key} must be true or false, got {value!r}.")
        return value

    def part(self, key: str) -> Mapping[str, Any]:
        """An object, empty if it is not there."""
        value = self._get(key, {})
        if not isinstance(value, Mapping):
            raise ConfigError("config.json", f"{key} must be an object, got {value!r}.")
        return value

    def _get(self, key: str, default: Any) -> Any:
        value = self.raw.get(key)
        if value is None:
            value = default
        if value is None:
            raise ConfigError("config.json", f"the key {key!r} is missing.")
        return value


def _text_part(raw: Mapping[str, Any]) -> tuple[Mapping[str, Any], str]:
    """The text model's own keys, and what its tensors' names begin with."""
    if raw.get("model_type") != "kimi_k25":
        return raw, ""
    text = raw.get("text_config")
    if not isinstance(text, Mapping):
        raise ConfigError(
            "config.json",
            "model_type='kimi_k25' needs 'text_config', an object with the text model's keys, "
            f"got {text!r}. This version runs the text part alone.",
        )
    outside = {key: raw.get(key) for key in ("bos_token_id", "eos_token_id", "quantization_config")}
    return outside | {key: value for key, value in text.items() if value is not None}, "language_model."


def _refuse_unsupported(raw: Mapping[str, Any]) -> None:
    indexer = {key: value for key, value in raw.items() if key.startswith("index_") and value is not None}
    if indexer or raw.get("model_type") == "deepseek_v32":
        seen = {"model_type": raw.get("model_type")} | indexer
        listed = ", ".join(f"{key}={value!r}" for key, value in seen.items())
        raise ConfigError(
            "config.json",
            f"{listed}: the sparse attention of DeepSeek-V3.2, whose indexer picks the tokens that a query "
            "sees, is not supported; this version runs attention over all tokens (DeepSeek-V2, V3, R1, Kimi K2).",
        )
    model_types = f"{', '.join(map(repr, _TEXT_MODELS))}, and 'kimi_k25' around one of them"
    if raw.get("model_type") is None:
        raise ConfigError("config.json", f"the key 'model_type' is missing; this version runs {model_types}.")
    if raw["model_type"] not in _TEXT_MODELS:
        raise ConfigError(
            "config.json", f"model_type={raw['model_type']!r} is not supported; this version runs {model_types}."
        )
    for key, allowed in _ONLY.items():
        got = raw.get(key)
        if got is not None and got not in allowed:
            can = " or ".join(repr(a) for a in allowed)
            raise ConfigError("config.json", f"{key}={got!r} is not supported; this version runs {can}.")


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
        "config.json",
        f"scoring_func={scoring!r} with topk_method={method!r} is not supported; this version runs {can}.",
    )


def _quantization(raw: Mapping[str, Any]) -> Quantization | None:
    try:
        return Quantization.from_hf(raw.get("quantization_config"))
    except ValueError as error:
        raise ConfigError("config.json", str(error)) from None


def _rope(keys: _Keys) -> RopeConfig:
    # transformers 5 writes rope_parameters, 4 writes rope_theta and rope_scaling; the same numbers.
    new, old = (
        {"rope_type" if key == "type" else key: value for key, value in keys.part(name).items()}
        for name in ("rope_parameters", "rope_scaling")
    )
    differ = [key for key in old if old[key] != new.get(key)]
    if new and differ:
        raise ConfigError(
            "config.json",
            f"rope_parameters and rope_scaling differ in {', '.join(differ)}: no telling which is meant. Keep one.",
        )
    scaling = _Keys(new or old)
    kind = scaling.raw.get("rope_type", "default")
    if kind not in ("default", "yarn"):
        raise ConfigError(
            "config.json", f"rope type {kind!r} is not supported; this version runs 'default' and 'yarn'."
        )
    theta = _Keys(new).number("rope_theta", keys.number("rope_theta", 10000.0))
    if not theta:
        raise ConfigError("config.json", "rope_theta must be above 0, got 0.")
    interleaved = keys.flag("rope_interleave", True)
    if kind == "default":
        return RopeConfig(theta=theta, interleaved=interleaved)
    if scaling.raw.get("attention_factor") is not None or scaling.raw.get("truncate") is False:
        raise ConfigError("config.json", "rope_scaling with attention_factor or truncate=false is not supported.")
    original = scaling.whole("original_max_position_embeddings", 0)
    if not original:
        raise ConfigError("config.json", "YaRN needs rope_scaling.original_max_position_embeddings.")
    return RopeConfig(
        theta=theta,
        factor=scaling.number("factor", 0) or keys.whole("max_position_embeddings") / original,
        original_max_position=original,
        beta_fast=scaling.number("beta_fast", 0) or 32.0,
        beta_slow=scaling.number("beta_slow", 0) or 1.0,
        mscale=scaling.number("mscale", 0),
        mscale_all_dim=scaling.number("mscale_all_dim", 0),
        yarn=True,
        interleaved=interleaved,
    )


def _token_ids(value: Any, key: str, file: str = "config.json") -> tuple[int, ...]:
    ids = [] if value is None else value if isinstance(value, list) else [value]
    if not all(isinstance(i, int) and i >= 0 for i in ids):
        raise ConfigError(file, f"{key} must be a token id or a list of them, got {value!r}.")
    return tuple(ids)


def _read_json(path: Path, *, required: bool) -> dict[str, Any]:
    if not path.is_file():
        if not required:
            return {}
        what = "is not a directory" if not path.parent.is_dir() else "has no config.json"
        raise ConfigError("model", f"{path.parent} {what}. Give a Hugging Face model directory.")
    try:
        raw = json.loads(path.read_text())
    except (ValueError, OSError) as error:
        raise ConfigError(str(path), f"not readable as JSON: {error}") from error
    if not isinstance(raw, dict):
        raise ConfigError(str(path), f"expected a JSON object, got {type(raw).__name__}.")
    return raw
