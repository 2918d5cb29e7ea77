"""What a checkpoint's config.json says (`ModelConfig`) and what the operator asks for (`ServeConfig`)."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

Form = Literal["auto", "expanded", "absorbed"]
Implementation = Literal["auto", "fa3", "xla"]


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
    """The shape of a DeepSeek-V3-style MLA model. Letters in comments are those of docs/architecture.md."""

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
    tie_word_embeddings: bool = False
    num_mtp_layers: int = 0  # multi-token prediction; the first one is used, and only for speculation
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for name in ("vocab_size", "hidden_size", "num_layers", "num_heads", "kv_lora_rank", "qk_nope_head_dim",
                     "v_head_dim", "max_position"):  # fmt: skip
            if getattr(self, name) < 1:
                raise ConfigError(f"config.json: {name} must be at least 1, got {getattr(self, name)}.")
        if self.qk_rope_head_dim < 2 or self.qk_rope_head_dim % 2:
            raise ConfigError(f"config.json: qk_rope_head_dim must be even and positive, got {self.qk_rope_head_dim}.")
        if self.num_moe_layers:
            if self.n_group < 1 or self.n_routed_experts % self.n_group:
                raise ConfigError(
                    f"config.json: n_routed_experts={self.n_routed_experts} must be a multiple of n_group={self.n_group}."
                )
            if not 1 <= self.topk_group <= self.n_group:
                raise ConfigError(
                    f"config.json: topk_group must be 1 to n_group={self.n_group}, got {self.topk_group}."
                )
            choosable = self.topk_group * (self.n_routed_experts // self.n_group)
            if not 1 <= self.experts_per_token <= choosable:
                raise ConfigError(
                    f"config.json: num_experts_per_tok must be 1 to {choosable} (the experts of {self.topk_group} of "
                    f"{self.n_group} groups), got {self.experts_per_token}."
                )
            if self.n_group > 1 and self.n_routed_experts // self.n_group < 2:
                raise ConfigError(
                    "config.json: a group's score is its two best experts' sum, so a group needs two experts."
                )

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
        """Reads a Hugging Face config.json's contents, as transformers 4 or 5 writes them.

        Raises:
          ConfigError: a missing key, or a setting that this package does not implement.
        """
        _refuse_unsupported(raw)

        def need(key: str) -> Any:
            if raw.get(key) is None:
                raise ConfigError(f"config.json: the key {key!r} is missing.")
            return raw[key]

        experts = raw.get("n_routed_experts", raw.get("num_local_experts")) or 0
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
            n_group=raw.get("n_group") or 1,
            topk_group=raw.get("topk_group") or 1,
            norm_topk_prob=bool(raw.get("norm_topk_prob", True)),
            routed_scaling_factor=float(raw.get("routed_scaling_factor") or 1.0),
            rms_norm_eps=float(raw.get("rms_norm_eps", 1e-6)),
            max_position=need("max_position_embeddings"),
            rope=_rope(raw),
            tie_word_embeddings=bool(raw.get("tie_word_embeddings", False)),
            num_mtp_layers=raw.get("num_nextn_predict_layers") or raw.get("num_mtp_layers") or 0,
            bos_token_id=raw.get("bos_token_id"),
            eos_token_ids=_token_ids(raw.get("eos_token_id"), "eos_token_id"),
        )


# What this package implements, for the keys whose other values would change the model's arithmetic.
_ONLY: dict[str, tuple[Any, ...]] = {
    "model_type": ("deepseek_v3", "kimi_k2"),
    "hidden_act": ("silu",),
    "attention_bias": (False,),
    "scoring_func": ("sigmoid",),
    "topk_method": ("noaux_tc",),
    "moe_layer_freq": (1,),
    "quantization_config": (),
}


def _refuse_unsupported(raw: Mapping[str, Any]) -> None:
    for key, allowed in _ONLY.items():
        got = raw.get(key)
        if got is not None and got not in allowed:
            can = " or ".join(repr(a) for a in allowed) or "no value"
            raise ConfigError(f"config.json: {key}={got!r} is not supported; this version runs {can}.")
    if raw.get("model_type") is None:
        raise ConfigError("config.json: the key 'model_type' is missing; expected 'deepseek_v3' or 'kimi_k2'.")


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
