"""`Build`: the static configuration that a model is built with."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp

from jax_mla_cp.attention import Resolved, page_multiple
from jax_mla_cp.config.errors import ConfigError
from jax_mla_cp.config.model import ModelConfig
from jax_mla_cp.config.quantization import Fp8Compute
from jax_mla_cp.mesh import CP, DP, TP, Axes, MeshShape
from jax_mla_cp.model.grouped_matmul import GroupedMatmul, has_kernels

EP_CHOICES: dict[str, tuple[str, ...]] = {"none": (), "tp": (TP,), "tp,cp": (CP, TP), "tp,cp,dp": (DP, CP, TP)}
"""The choices of `ep_axes`, each with the mesh axes that divide the experts, slowest first.

With none each device has all experts, and tp divides their width, as it does that of other MLPs.
"""


@dataclasses.dataclass(frozen=True)
class Build:
    """The static configuration that a model is built with: model, mesh, dtypes and implementations.

    Modules read it while they are traced, and nothing else: no module asks JAX for its devices. It is hashable, because it
    is the static part of `Model`, and with it of the key under which `jax.jit` finds a compiled program. `launch.plan_build`
    resolves each "auto"; the defaults here run on any device.
    """

    config: ModelConfig
    shape: MeshShape | None = None
    """None: no mesh, one device."""
    ep_axes: tuple[str, ...] = (TP,)
    dtype: jnp.dtype = dataclasses.field(default_factory=lambda: jnp.dtype(jnp.float32))
    attention: Resolved = "xla"
    grouped_matmul: GroupedMatmul = "blocks"
    fp8: bool = False
    """Matrices that the checkpoint has quantized stay in FP8, where their blocks stay whole (model/fp8_blocks.py)."""
    fp8_compute: Fp8Compute = "w8a16"
    mtp: bool = False
    """With the checkpoint's first layer for multi-token prediction, which proposes drafts."""

    def __post_init__(self) -> None:
        if self.fp8 and self.config.quantization is None:
            raise ConfigError(
                "weights",
                "'fp8' needs a quantized checkpoint; this one is not (its config.json has no quantization_config). "
                "Use weights='auto'.",
            )
        if self.fp8_compute == "w8a8":
            _check_w8a8(self)
        if self.mtp and not self.config.num_mtp_layers:
            raise ConfigError(
                "mtp",
                "the model has no layer for multi-token prediction (config.json's num_nextn_predict_layers). Leave it off.",
            )
        _check_divides(self)

    @property
    def axes(self) -> Axes:
        """The mesh axes' collectives, for code that runs per device."""
        return Axes(self.shape)

    @property
    def kernels(self) -> bool:
        """True if the extension's CUDA kernels run on the devices; else XLA code of the same meaning does."""
        return has_kernels(self.grouped_matmul)

    @property
    def ep_name(self) -> str:
        """The choice of `ep_axes`."""
        return next(name for name, axes in EP_CHOICES.items() if axes == self.ep_axes)

    @property
    def cache_layers(self) -> int:
        """Layers that write latents to the cache; the MTP layer's come last."""
        return self.config.num_layers + self.mtp

    @property
    def page_multiple(self) -> int:
        """Divides every page size that the attention can read."""
        return page_multiple(self.attention)

    @property
    def padded_vocab(self) -> int:
        """Rows of the embedding: the vocabulary, rounded up to a multiple of tp. The logits of padding are -inf."""
        return _round_up(self.config.vocab_size, self.axes.size(TP))

    @property
    def padded_experts(self) -> int:
        """Experts in memory: rounded up to a multiple of the devices that divide them. The router never chooses padding."""
        return _round_up(self.config.n_routed_experts, self.axes.size(self.ep_axes))


def _check_w8a8(build: Build) -> None:
    quantization = build.config.quantization
    if quantization is None or not quantization.multiplies_in_fp8:
        raise ConfigError(
            "fp8_compute",
            "'w8a8' needs a checkpoint in FP8 with blocks of 128 x 128, as DeepSeek-V3's; this one "
            + (
                "is not quantized"
                if quantization is None
                else f"is in {quantization.kind}, blocks {quantization.block}"
            )
            + ". Use fp8_compute='auto'.",
        )
    if not build.fp8:
        raise ConfigError(
            "fp8_compute", "'w8a8' needs weights that stay in FP8, and they are dequantized. Add weights='fp8'."
        )
    if build.grouped_matmul in ("pallas", "ragged"):
        raise ConfigError(
            "fp8_compute",
            "'w8a8' needs a Hopper GPU and this package's CUDA kernels (README.md, On GPUs), which can't run here. Use "
            "fp8_compute='auto'.",
        )


def _round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


def _check_divides(build: Build) -> None:
    """Checks that tp divides the heads and the widths of the MLPs.

    Raises:
      ConfigError: it does not.
    """
    config, shape = build.config, build.shape or MeshShape()
    rules = {"num_attention_heads": config.num_heads}
    if config.num_dense_layers:
        rules["intermediate_size"] = config.intermediate_size
    if config.num_moe_layers and not build.ep_axes:
        rules["moe_intermediate_size"] = config.moe_intermediate_size
    if config.num_moe_layers and config.n_shared_experts:
        rules["n_shared_experts * moe_intermediate_size"] = config.n_shared_experts * config.moe_intermediate_size
    for name, size in rules.items():
        if size % shape.tp:
            fits = [d for d in range(1, shape.tp) if all(s % d == 0 for s in rules.values())]
            raise ConfigError(
                "mesh",
                f"tp must divide the model's {name}={size}, got tp={shape.tp}. "
                f"Use tp={max(fits)}, and cp for the other devices.",
            )
