"""Hugging Face's config.json -> the fields of `ModelConfig`: its keys, their older and newer spellings, and what is refused."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from jax_mla_cp.config.errors import ConfigError
from jax_mla_cp.config.files import read_json
from jax_mla_cp.config.keys import Keys, agreed
from jax_mla_cp.config.other_formats import refuse_model_optimizer, refused_format
from jax_mla_cp.config.quantization import Quantization
from jax_mla_cp.config.rope_keys import rope_config

# What this package implements, for the keys whose other values would change the model's arithmetic.
_ONLY: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "moe_layer_freq": (1,),
}

TopkMethod = Literal["noaux_tc", "greedy", "group_limited_greedy"]

_TEXT_MODELS = ("deepseek_v2", "deepseek_v3", "kimi_k2", "glm4_moe_lite")
_MULTIMODAL = ("kimi_k25", "kimi_vl")
"""Models whose text part, one of the above, is in `text_config`."""

_SPARSE = ("deepseek_v32", "glm_moe_dsa")
_OTHER_ATTENTION = {
    "deepseek_v4": "its layers attend to compressed tokens",
    "kimi_linear": "most of its layers have linear attention",
    "longcat_flash": "its layers have two attentions and experts that compute nothing",
}
"""Models with latent attention that this package does not run, and what they have beside it."""

# The scores that each way of choosing experts is defined for, by DeepSeek's modeling files and transformers.
_SCORING: dict[TopkMethod, str] = {"noaux_tc": "sigmoid", "greedy": "softmax", "group_limited_greedy": "softmax"}


def directory_fields(directory: Path) -> dict[str, Any]:
    """The fields of `ModelConfig.from_dir`: those of config.json, and the stop tokens of generation_config.json besides.

    Raises:
      ConfigError: as `ModelConfig.from_dir`.
    """
    path = directory / "config.json"
    if not path.is_file():
        what = "is not a directory" if not directory.is_dir() else "has no config.json"
        raise ConfigError("model", f"{directory} {what}. Give a Hugging Face model directory.")
    raw = read_json(path)
    _refuse_model_optimizer(read_json(path.with_name("hf_quant_config.json")))
    generation = read_json(path.with_name("generation_config.json"))
    found = fields(raw)
    more = _end_tokens(generation, found["vocab_size"], "generation_config.json")
    return found | {"eos_token_ids": tuple(dict.fromkeys(found["eos_token_ids"] + more))}


def fields(raw: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of `ModelConfig.from_hf`, each of its type. `ModelConfig` checks how they fit together.

    Raises:
      ConfigError: as `ModelConfig.from_hf`.
    """
    raw, weight_prefix = _text_part(raw)
    _refuse_unsupported(raw)

    keys = Keys(raw)
    glm = raw["model_type"] == "glm4_moe_lite"
    experts = keys.whole(keys.spelling("n_routed_experts", "num_local_experts"), 0)
    topk_method = _topk_method(raw)
    grouped = experts and topk_method != "greedy"  # which ignores the groups that a config may name
    vocab_size = keys.whole("vocab_size")
    return dict(
        vocab_size=vocab_size,
        hidden_size=keys.whole("hidden_size"),
        num_layers=keys.whole("num_hidden_layers"),
        num_heads=keys.whole("num_attention_heads"),
        q_lora_rank=None if raw.get("q_lora_rank") is None else keys.whole("q_lora_rank"),
        kv_lora_rank=keys.whole("kv_lora_rank"),
        qk_rope_head_dim=keys.whole("qk_rope_head_dim"),
        qk_nope_head_dim=keys.whole("qk_nope_head_dim"),
        v_head_dim=keys.whole("v_head_dim"),
        intermediate_size=keys.whole("intermediate_size"),
        first_k_dense=_first_k_dense(keys, 1 if glm else 0),
        moe_intermediate_size=keys.whole("moe_intermediate_size") if experts else 0,
        n_routed_experts=experts,
        n_shared_experts=keys.whole("n_shared_experts", 0),
        experts_per_token=keys.whole("num_experts_per_tok") if experts else 0,
        n_group=keys.whole("n_group") if grouped else 1,
        topk_group=keys.whole("topk_group") if grouped else 1,
        norm_topk_prob=keys.flag("norm_topk_prob", topk_method == "noaux_tc"),
        routed_scaling_factor=keys.number("routed_scaling_factor") if experts else 1.0,
        rms_norm_eps=keys.number("rms_norm_eps", 1e-5 if glm else 1e-6),
        max_position=keys.whole("max_position_embeddings"),
        rope=rope_config(keys),
        topk_method=topk_method,
        tie_word_embeddings=keys.flag("tie_word_embeddings", False),
        num_mtp_layers=keys.whole(keys.spelling("num_nextn_predict_layers", "num_mtp_layers"), 0),
        bos_token_id=next(iter(_token_ids(raw, "bos_token_id")), None),
        eos_token_ids=_end_tokens(raw, vocab_size, "config.json"),
        weight_prefix=weight_prefix,
        quantization=_quantization(raw),
    )


def _text_part(raw: Mapping[str, Any]) -> tuple[Mapping[str, Any], str]:
    """The text model's own keys, and what its tensors' names begin with."""
    model_type = raw.get("model_type")
    if model_type not in _MULTIMODAL:
        return raw, ""
    text = raw.get("text_config")
    if not isinstance(text, Mapping):
        raise ConfigError(
            "config.json",
            f"model_type={model_type!r} needs 'text_config', an object with the text model's keys, "
            f"got {text!r}. This version runs the text part alone.",
        )
    merged = {key: value for key, value in text.items() if value is not None}
    for key in ("quantization_config", "tie_word_embeddings"):
        given = {
            place + key: part[key] for place, part in (("", raw), ("text_config.", text)) if part.get(key) is not None
        }
        if given:
            merged[key] = agreed(given)
    merged.setdefault("bos_token_id", raw.get("bos_token_id"))
    merged["eos_token_id"] = list(dict.fromkeys(_token_ids(raw, "eos_token_id") + _token_ids(text, "eos_token_id")))
    return merged, "language_model."


def _refuse_unsupported(raw: Mapping[str, Any]) -> None:
    model_type = raw.get("model_type")
    indexer = {key: value for key, value in raw.items() if key.startswith("index_") and value is not None}
    if indexer or model_type in _SPARSE:
        seen = {"model_type": model_type} | indexer
        listed = ", ".join(f"{key}={value!r}" for key, value in seen.items())
        raise ConfigError(
            "config.json",
            f"{listed}: the sparse attention of DeepSeek-V3.2, whose indexer picks the tokens that a query "
            "sees, is not supported; this version runs attention over all tokens (DeepSeek-V2, V3, R1, Kimi K2).",
        )
    model_types = f"{', '.join(map(repr, _TEXT_MODELS))}, and {' or '.join(map(repr, _MULTIMODAL))} around one of them"
    if model_type is None:
        raise ConfigError("config.json", f"the key 'model_type' is missing; this version runs {model_types}.")
    if model_type not in _TEXT_MODELS:
        other = _OTHER_ATTENTION.get(str(model_type))
        reason = f" ({other})" if other else ""
        raise ConfigError(
            "config.json", f"model_type={model_type!r} is not supported{reason}; this version runs {model_types}."
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


def _first_k_dense(keys: Keys, default: int) -> int:
    """The number of layers at the front with a dense MLP: `first_k_dense_replace`, or the list that transformers writes for GLM."""
    types = keys.raw.get("mlp_layer_types")
    if types is None:
        return keys.whole("first_k_dense_replace", default)
    layers = keys.whole("num_hidden_layers")
    dense = types.count("dense") if isinstance(types, list) else -1
    if types != ["dense"] * dense + ["sparse"] * (layers - dense):
        raise ConfigError(
            "config.json",
            f"mlp_layer_types must be {layers} times 'dense' or 'sparse', the dense ones first; this version runs no other order.",
        )
    given = {"the number of 'dense' in mlp_layer_types": dense}
    if keys.has("first_k_dense_replace"):
        given["first_k_dense_replace"] = keys.whole("first_k_dense_replace")
    return int(agreed(given))


def _quantization(raw: Mapping[str, Any]) -> Quantization | None:
    if isinstance(mlx := raw.get("quantization"), Mapping) and "bits" in mlx:
        raise ConfigError("config.json", f"quantization: {refused_format('MLX')}")
    try:
        return Quantization.from_hf(raw.get("quantization_config"))
    except ValueError as error:
        raise ConfigError("config.json", str(error)) from None


def _refuse_model_optimizer(raw: Mapping[str, Any]) -> None:
    try:
        refuse_model_optimizer(raw)
    except ValueError as error:
        raise ConfigError("hf_quant_config.json", str(error)) from None


def _end_tokens(raw: Mapping[str, Any], vocab_size: int, file: str) -> tuple[int, ...]:
    ids = _token_ids(raw, "eos_token_id", file)
    if any(i >= vocab_size for i in ids):
        raise ConfigError(
            file,
            f"eos_token_id must be below vocab_size={vocab_size}, got {max(ids)}. Take all files from one checkpoint.",
        )
    return ids


def _token_ids(raw: Mapping[str, Any], key: str, file: str = "config.json") -> tuple[int, ...]:
    value = raw.get(key)
    ids = [] if value is None else value if isinstance(value, list) else [value]
    if not all(isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in ids):
        raise ConfigError(file, f"{key} must be a token id or a list of them, got {value!r}.")
    return tuple(ids)
