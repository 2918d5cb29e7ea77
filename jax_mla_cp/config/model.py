"""`ModelConfig`: the shape of a model, checked."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jax_mla_cp.config import huggingface
from jax_mla_cp.config.errors import ConfigError
from jax_mla_cp.config.huggingface import TopkMethod
from jax_mla_cp.config.quantization import Quantization
from jax_mla_cp.config.rope import RopeConfig, yarn_mscale


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
    first_k_dense: int  # layers at the front with a dense MLP; the others have experts
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
    """The router's scores and choice of experts: `route` in model/router.py."""
    tie_word_embeddings: bool = False
    num_mtp_layers: int = 0  # multi-token prediction; the first one is used, and only for speculation
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    weight_prefix: str = ""
    """Stands before every tensor's name in a checkpoint that holds more than this model."""
    quantization: Quantization | None = None
    """Format of the checkpoint's matrices; None: not quantized."""

    def __post_init__(self) -> None:
        for name in (
            "vocab_size",
            "hidden_size",
            "num_layers",
            "num_heads",
            "kv_lora_rank",
            "qk_nope_head_dim",
            "v_head_dim",
            "intermediate_size",
            "max_position",
        ):
            if getattr(self, name) < 1:
                raise ConfigError("config.json", f"{name} must be at least 1, got {getattr(self, name)}.")
        if self.q_lora_rank is not None and self.q_lora_rank < 1:
            raise ConfigError("config.json", f"q_lora_rank must be at least 1, or null, got {self.q_lora_rank}.")
        if self.qk_rope_head_dim < 2 or self.qk_rope_head_dim % 2:
            raise ConfigError(
                "config.json", f"qk_rope_head_dim must be even and positive, got {self.qk_rope_head_dim}."
            )
        if self.num_moe_layers:
            self._check_routing()
            if self.moe_intermediate_size < 1:
                raise ConfigError(
                    "config.json", f"moe_intermediate_size must be at least 1, got {self.moe_intermediate_size}."
                )
            packed = self.quantization.packed if self.quantization else 1
            if self.hidden_size % packed or self.moe_intermediate_size % packed:
                raise ConfigError(
                    "config.json",
                    f"hidden_size={self.hidden_size} and moe_intermediate_size={self.moe_intermediate_size} must "
                    f"be multiples of {packed}, the number of expert weights packed into one element.",
                )

    def _check_routing(self) -> None:
        if self.n_group < 1 or self.n_routed_experts % self.n_group:
            raise ConfigError(
                "config.json", f"n_routed_experts={self.n_routed_experts} must be a multiple of n_group={self.n_group}."
            )
        if self.topk_method == "greedy" and self.n_group != 1:
            raise ConfigError(
                "config.json",
                f"topk_method='greedy' does not use expert groups: n_group must be 1, got {self.n_group}. "
                "With groups it is 'group_limited_greedy'.",
            )
        if not 1 <= self.topk_group <= self.n_group:
            raise ConfigError("config.json", f"topk_group must be 1 to n_group={self.n_group}, got {self.topk_group}.")
        choosable = self.topk_group * (self.n_routed_experts // self.n_group)
        if not 1 <= self.experts_per_token <= choosable:
            raise ConfigError(
                "config.json",
                f"num_experts_per_tok must be 1 to {choosable} (the experts of {self.topk_group} of "
                f"{self.n_group} groups), got {self.experts_per_token}.",
            )
        if self.routing_bias and self.n_group > 1 and self.n_routed_experts // self.n_group < 2:
            raise ConfigError(
                "config.json", "a group's score is its two best experts' sum, so a group needs two experts."
            )
        if self.norm_topk_prob and not self.routing_bias:
            raise ConfigError(
                "config.json",
                f"norm_topk_prob=true with topk_method={self.topk_method!r} is not supported: DeepSeek's "
                "code then leaves out routed_scaling_factor, transformers the normalization, and no published model "
                "says which is meant. This version runs norm_topk_prob=false.",
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
        return cls(**huggingface.directory_fields(Path(directory)))

    @classmethod
    def from_hf(cls, raw: Mapping[str, Any]) -> ModelConfig:
        """Reads a Hugging Face config.json's contents, as transformers 4 or 5 writes them; of a multimodal model, the text part.

        Raises:
          ConfigError: a missing key, or a setting that this package does not implement.
        """
        return cls(**huggingface.fields(raw))
