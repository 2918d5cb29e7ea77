"""What every module of the model is built with, and what every layer's call is given."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int32

from jax_mla_cp.attention import Resolved, Rows, page_multiple
from jax_mla_cp.config.errors import ConfigError
from jax_mla_cp.config.model import ModelConfig
from jax_mla_cp.config.quantization import Quantization
from jax_mla_cp.mesh import CP, DP, TP, Axes, MeshShape
from jax_mla_cp.model.fp8 import Fp8

EP_CHOICES: dict[str, tuple[str, ...]] = {"tp": (TP,), "tp,cp": (CP, TP), "tp,cp,dp": (DP, CP, TP)}
"""--ep-axes -> the mesh axes that divide the experts, slowest first."""


@dataclasses.dataclass(frozen=True)
class Build:
    """Everything static about a model on a mesh. `shape` None is no mesh at all."""

    config: ModelConfig
    shape: MeshShape | None = None
    ep_axes: tuple[str, ...] = (TP,)
    dtype: jnp.dtype = dataclasses.field(default_factory=lambda: jnp.dtype(jnp.float32))
    attention: Resolved = "xla"
    fp8: bool = False
    """Matrices that the checkpoint has quantized stay in FP8."""
    mtp: bool = False
    """With the checkpoint's first layer for multi-token prediction, which proposes drafts."""

    def __post_init__(self) -> None:
        if self.fp8 and self.config.quantization is None:
            raise ConfigError(
                "weights",
                "'fp8' needs a quantized checkpoint; this one is not (its config.json has no quantization_config). "
                "Use weights='auto'.",
            )
        if self.mtp and not self.config.num_mtp_layers:
            raise ConfigError(
                "mtp",
                "the model has no layer for multi-token prediction (config.json's num_nextn_predict_layers). Leave it off.",
            )
        _check_divides(self.config, self.shape or MeshShape())

    @property
    def axes(self) -> Axes:
        return Axes(self.shape)

    @property
    def page_multiple(self) -> int:
        """Divides every page size that the attention can read."""
        return page_multiple(self.attention)

    @property
    def cache_layers(self) -> int:
        """Layers that leave latents in the cache; the MTP layer's are behind the others'."""
        return self.config.num_layers + self.mtp

    @property
    def padded_vocab(self) -> int:
        """Rows of the embedding: the vocabulary, rounded up to a multiple of tp. Their logits are -inf."""
        return _round_up(self.config.vocab_size, self.axes.size(TP))

    @property
    def padded_experts(self) -> int:
        """Experts in memory: rounded up to a multiple of the devices that divide them. The router knows only the real ones."""
        return _round_up(self.config.n_routed_experts, self.axes.size(self.ep_axes))


def _round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


def _check_divides(config: ModelConfig, shape: MeshShape) -> None:
    """What tp must divide."""
    rules = {"num_attention_heads": config.num_heads}
    if config.num_dense_layers:
        rules["intermediate_size"] = config.intermediate_size
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


class Declare:
    """Declares parameters: their shape and dtype, and beside them, as `spec`, how a mesh divides them.

    The values are `jax.ShapeDtypeStruct`s until a checkpoint is loaded. With `layers`, every parameter gets a leading
    dimension of that many layers, for `lax.scan`: each layer sees its own slice, or, of `experts`, all of it.
    XLA copies the slice that a kernel of ours is given, which for experts would be gigabytes a layer.
    """

    def __init__(self, build: Build, layers: int | None = None):
        self.build = build
        self.layers = layers

    def __call__(
        self,
        *shape: int,
        spec: tuple[str | tuple[str, ...] | None, ...] = (),
        dtype: jnp.dtype | None = None,
        experts: bool = False,
    ) -> nnx.Param[Any]:
        return self._param(shape, spec, dtype or self.build.dtype, experts)

    def matrix(
        self,
        *shape: int,
        blocks: tuple[int, ...],
        spec: tuple[str | tuple[str, ...] | None, ...] = (),
        experts: bool = False,
    ) -> nnx.Param[Any] | Fp8:
        """A matrix that a checkpoint may have quantized: [inputs, ...outputs], of experts [E, inputs, outputs].

        Args:
          blocks: the dimensions along which its scales stay one per block; the last one is of outputs, others of inputs.
            Not one that the mesh divides, or that is a part of the stored one, as heads are: blocks would be cut.
        """
        quantization = self.build.config.quantization
        if quantization is None or (quantization.experts_only and not experts):
            return self._param(shape, spec, self.build.dtype, experts)
        sizes = _block_sizes(len(shape), blocks, quantization)
        if not self.build.fp8:
            return self._param(shape, spec, self.build.dtype, experts, sizes)
        scales = tuple(-(-size // block) for size, block in zip(shape, sizes, strict=True))
        q = self._param(shape, spec, jnp.dtype(jnp.uint8), experts, sizes)
        return Fp8(
            q, self._param(scales, spec, jnp.dtype(quantization.scale_dtype), experts, sizes), sizes, self.build.dtype
        )

    def _param(
        self,
        shape: tuple[int, ...],
        spec: tuple[str | tuple[str, ...] | None, ...],
        dtype: jnp.dtype,
        experts: bool,
        blocks: tuple[int, ...] = (),
    ) -> nnx.Param[Any]:
        if self.layers is not None:
            shape, spec, blocks = (self.layers, *shape), (None, *spec), (1, *blocks) if blocks else ()
        value = jax.ShapeDtypeStruct(shape, dtype)
        return nnx.Param(value, spec=PartitionSpec(*spec), whole=experts, blocks=blocks)


def _block_sizes(dims: int, blocks: tuple[int, ...], quantization: Quantization) -> tuple[int, ...]:
    outputs, inputs = quantization.block
    return tuple((outputs if dim == dims - 1 else inputs) if dim in blocks else 1 for dim in range(dims))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LayerInputs:
    """What all layers of a step share, on one device."""

    valid: Bool[Array, " T"]
    """Which tokens exist."""
    cos: Float[Array, "T r/2"]
    sin: Float[Array, "T r/2"]
    slots: Int32[Array, " cp*T"]
    pages_to_zero: Int32[Array, " I"]
    key_pages: Int32[Array, " K/page"]
    num_keys: Int32[Array, " 1"]
    expanded: Rows
    absorbed: Rows
    row_pages: Int32[Array, "B W"]
    """The page table, row by row of `absorbed`."""
    absorbed_tokens: int = dataclasses.field(metadata={"static": True})
    """The tokens of absorbed rows are among the first so many."""
