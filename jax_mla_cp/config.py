"""What a checkpoint's config.json says (`ModelConfig`) and what the operator asks for (`ServeConfig`)."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from jax_mla_cp.quantization import Quantization

Form = Literal["auto", "expanded", "absorbed"]
Implementation = Literal["auto", "fa3", "xla"]
TopkMethod = Literal["noaux_tc", "greedy", "group_limited_greedy"]


class ConfigError(ValueError):
    """A setting that can't work: names the setting, what it got, what is allowed and what to change."""


@dataclasses.dataclass(frozen=True)
class RopeConfig:
    """Rotary embedding, plain or YaRN (arXiv:2309.00071; `modeling_rope_utils.py` of transformers)."""

    theta: float = 10000.0
    factor: float = 1.0
    """YaRN's context extension; 1 is plain RoPE."""
    original_max_position: int = 4096
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 0.0
    mscale_all_dim: float = 0.0
    yarn: bool = False
    interleaved: bool = True
    """The checkpoint rotates even/odd pairs; the loader reorders such weights into halves."""

    @property
    def amplitude(self) -> float:
        """What cos and sin are multiplied with: 1 whenever `mscale == mscale_all_dim`."""
        if not self.yarn:
            return 1.0
        if self.mscale and self.mscale_all_dim:
            return yarn_mscale(self.factor, self.mscale) / yarn_mscale(self.factor, self.mscale_all_dim)
        return yarn_mscale(self.factor, 1.0)


def yarn_mscale(factor: float, mscale: float) -> float:
    """`0.1 m ln(factor) + 1`, YaRN's attention temperature (arXiv:2309.00071, equation 22)."""
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The shape of a DeepSeek-style MLA model (docs/models.md). Letters in comments are those of docs/architecture.md."""

    vocab_size: int
    hidden_size: int  # D
    num_layers: int
    num_heads: int  # N
    q_lora_rank: int | None  # Q; None: one query projection
    kv_lora_rank: int  # R
    qk_rope_head_dim: int  # r
    qk_nope_head_dim: int  # h
    v_head_dim: int  # v
    intermediate_size: int
    first_k_dense: int  # the first so many layers have a dense MLP, the others experts
    moe_intermediate_size: int
    n_routed_experts: int  # E; 0: every layer is dense
    n_shared_experts: int
    experts_per_token: int
    n_group: int
    topk_group: int
    norm_topk_prob: bool
    routed_scaling_factor: float
    rms_norm_eps: float
    max_position: int
    rope: RopeConfig
    topk_method: TopkMethod = "noaux_tc"
    """How the router scores and chooses experts: `model/moe.py`, `route`."""
    tie_word_embeddings: bool = False
    num_mtp_layers: int = 0  # multi-token prediction; the first one is used, and only for speculation
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    weight_prefix: str = ""
    """Stands before every tensor's name in a checkpoint that holds more than this model."""
    quantization: Quantization | None = None
    """How the checkpoint stores its matrices; None: as plain numbers."""

    def __post_init__(self) -> None:
        for name in ("vocab_size", "hidden_size", "num_layers", "num_heads", "kv_lora_rank", "qk_nope_head_dim",
                     "v_head_dim", "max_position"):  # fmt: skip
            if getattr(self, name) < 1:
                raise ConfigError(f"config.json: {name} must be at least 1, got {getattr(self, name)}.")
        if self.qk_rope_head_dim < 2 or self.qk_rope_head_dim % 2:
            raise ConfigError(f"config.json: qk_rope_head_dim must be even and positive, got {self.qk_rope_head_dim}.")
        if self.num_moe_layers:
            self._check_routing()
            packed = self.quantization.packed if self.quantization else 1
            if self.hidden_size % packed or self.moe_intermediate_size % packed:
                raise ConfigError(
                    f"config.json: hidden_size={self.hidden_size} and moe_intermediate_size={self.moe_intermediate_size} must "
                    f"be multiples of {packed}: so many of the experts' numbers are packed into one."
                )

    def _check_routing(self) -> None:
        if self.n_group < 1 or self.n_routed_experts % self.n_group:
            raise ConfigError(
                f"config.json: n_routed_experts={self.n_routed_experts} must be a multiple of n_group={self.n_group}."
            )
        if self.topk_method == "greedy" and self.n_group != 1:
            raise ConfigError(
                f"config.json: topk_method='greedy' knows no groups: n_group must be 1, got {self.n_group}. "
                "With groups it is 'group_limited_greedy'."
            )
        if not 1 <= self.topk_group <= self.n_group:
            raise ConfigError(f"config.json: topk_group must be 1 to n_group={self.n_group}, got {self.topk_group}.")
        choosable = self.topk_group * (self.n_routed_experts // self.n_group)
        if not 1 <= self.experts_per_token <= choosable:
            raise ConfigError(
                f"config.json: num_experts_per_tok must be 1 to {choosable} (the experts of {self.topk_group} of "
                f"{self.n_group} groups), got {self.experts_per_token}."
            )
        if self.routing_bias and self.n_group > 1 and self.n_routed_experts // self.n_group < 2:
            raise ConfigError(
                "config.json: a group's score is its two best experts' sum, so a group needs two experts."
            )
        if self.norm_topk_prob and not self.routing_bias:
            raise ConfigError(
                f"config.json: norm_topk_prob=true with topk_method={self.topk_method!r} is not supported: DeepSeek's "
                "code then leaves out routed_scaling_factor, transformers the normalisation, and no published model "
                "says which is meant. This version runs norm_topk_prob=false."
            )

    @property
    def routing_bias(self) -> bool:
        """The checkpoint has `e_score_correction_bias`, which takes part in the choice of experts."""
        return self.topk_method == "noaux_tc"

    @property
    def num_dense_layers(self) -> int:
        return self.num_layers if self.n_routed_experts == 0 else min(self.first_k_dense, self.num_layers)

    @property
    def num_moe_layers(self) -> int:
        return self.num_layers - self.num_dense_layers

    @property
    def latent_dim(self) -> int:
        """`R + r`: what a token leaves in the cache, per layer."""
        return self.kv_lora_rank + self.qk_rope_head_dim

    @property
    def softmax_scale(self) -> float:
        """`(h + r)^-1/2`, times YaRN's temperature squared (DeepSeek-V3's inference/model.py, class MLA)."""
        scale = float(self.qk_nope_head_dim + self.qk_rope_head_dim) ** -0.5
        if self.rope.yarn and self.rope.mscale_all_dim:
            scale *= yarn_mscale(self.rope.factor, self.rope.mscale_all_dim) ** 2
        return scale

    @classmethod
    def from_dir(cls, directory: str | Path) -> ModelConfig:
        """Reads `config.json` and the stop tokens of `generation_config.json`.

        Raises:
          ConfigError: no such directory or file, not JSON, or a model that this package can't run.
        """
        path = Path(directory) / "config.json"
        raw = _read_json(path, required=True)
        generation = _read_json(path.with_name("generation_config.json"), required=False)
        config = cls.from_hf(raw)
        eos = dict.fromkeys(config.eos_token_ids + _token_ids(generation.get("eos_token_id"), "eos_token_id"))
        return dataclasses.replace(config, eos_token_ids=tuple(eos))

    @classmethod
    def from_hf(cls, raw: Mapping[str, Any]) -> ModelConfig:
        """Reads a Hugging Face config.json's contents, as transformers 4 or 5 writes them; of a multimodal model, the text part.

        Raises:
          ConfigError: a missing key, or a setting that this package does not implement.
        """
        raw, weight_prefix = _text_part(raw)
        _refuse_unsupported(raw)

        def need(key: str) -> Any:
            if raw.get(key) is None:
                raise ConfigError(f"config.json: the key {key!r} is missing.")
            return raw[key]

        experts = raw.get("n_routed_experts", raw.get("num_local_experts")) or 0
        topk_method = _topk_method(raw)
        grouped = experts and topk_method != "greedy"  # which ignores the groups that a config may name
        return cls(
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
