"""The table from Hugging Face tensor names to parameters.

A checkpoint stores matrices as [outputs, inputs], and so lie the parameters; layers and experts are stacked. Only the order of
roped rows changes, and W_UK and W_UV are taken from one matrix.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Container

import numpy as np
from numpy.typing import NDArray

from jax_mla_cp.config.model import ModelConfig


@dataclasses.dataclass(frozen=True)
class TensorMapping:
    """A checkpoint tensor and the part of a parameter that it fills.

    `index` has the dimensions of one layer (and one expert) of the parameter, without the stacked ones.
    """

    name: str
    """May contain {layer} and {expert}."""
    stored_shape: tuple[int, ...]
    """Shape in the checkpoint."""
    index: tuple[slice, ...] = ()
    """The part of the parameter that the tensor fills; () is all of it."""
    rows: NDArray[np.intp] | None = dataclasses.field(default=None, compare=False)
    """The tensor's rows, in the order and the dimensions of the parameter's outputs; None: all of them, in order."""
    transposed: bool = False
    """The parameter has inputs before outputs; never of a matrix that may be quantized."""

    @property
    def routed(self) -> bool:
        return "{expert}" in self.name


def tensor_mappings(config: ModelConfig) -> dict[str, tuple[TensorMapping, ...]]:
    """Maps each parameter (`Decoder`'s attributes, joined with dots) to the tensors that fill it."""
    c = config
    table: dict[str, tuple[TensorMapping, ...]] = {
        "embed": (TensorMapping("model.embed_tokens.weight", (c.vocab_size, c.hidden_size)),),
        "final_norm": (TensorMapping("model.norm.weight", (c.hidden_size,)),),
    }
    if not c.tie_word_embeddings:
        table["head"] = (TensorMapping("lm_head.weight", (c.vocab_size, c.hidden_size), transposed=True),)
    stacks = {"dense": (c.num_dense_layers, _dense_mlp), "moe": (c.num_moe_layers, _moe_mlp)}
    for stack, (layers, mlp) in stacks.items():
        if layers:
            table |= {f"{stack}.{path}": mappings for path, mappings in (_attention(c) | mlp(c)).items()}
    if c.num_mtp_layers:
        table |= _mtp(c)
    return {
        path: tuple(dataclasses.replace(mapping, name=c.weight_prefix + mapping.name) for mapping in mappings)
        for path, mappings in table.items()
    }


def _mtp(c: ModelConfig) -> dict[str, tuple[TensorMapping, ...]]:
    """The first MTP layer. Its copies of embedding and head are not read."""
    name, D = f"model.layers.{c.num_layers}.", c.hidden_size
    mlp = _moe_mlp(c) if c.n_routed_experts else _dense_mlp(c)
    return {
        "mtp.embed_norm": (TensorMapping(name + "enorm.weight", (D,)),),
        "mtp.hidden_norm": (TensorMapping(name + "hnorm.weight", (D,)),),
        "mtp.project": (TensorMapping(name + "eh_proj.weight", (D, 2 * D), transposed=True),),
        "mtp.final_norm": (TensorMapping(name + "shared_head.norm.weight", (D,)),),
    } | {f"mtp.layer.{path}": mappings for path, mappings in (_attention(c) | mlp).items()}


def mtp_marker(config: ModelConfig, layer: int) -> str:
    """The name of a tensor that a layer has only if it is an MTP layer."""
    return f"{config.weight_prefix}model.layers.{layer}.eh_proj.weight"


def has_mtp(config: ModelConfig, names: Container[str]) -> bool:
    """True if a checkpoint with these tensors has the MTP layer that its config names."""
    return config.num_mtp_layers > 0 and mtp_marker(config, config.num_layers) in names


def _attention(c: ModelConfig) -> dict[str, tuple[TensorMapping, ...]]:
    layer = "model.layers.{layer}."
    attn = layer + "self_attn."
    D, N, R, r, h, v = (
        c.hidden_size,
        c.num_heads,
        c.kv_lora_rank,
        c.qk_rope_head_dim,
        c.qk_nope_head_dim,
        c.v_head_dim,
    )

    def roped(name: str, heads: int, rows: int, inputs: int) -> tuple[TensorMapping, ...]:
        """Reorders the last r rows of every head's from pairs (0, 1), (2, 3) .. to pairs (i, i + r/2)."""
        order = np.arange(heads * rows).reshape(heads, rows)
        order[:, -r:] = np.concatenate([order[:, -r::2], order[:, -r + 1 :: 2]], axis=1)
        return (TensorMapping(attn + name, (heads * rows, inputs), rows=order.ravel() if c.rope.interleaved else None),)

    def kv_up(rows: slice) -> tuple[TensorMapping, ...]:
        of_heads = np.arange(N * (h + v)).reshape(N, h + v)[:, rows]
        return (TensorMapping(attn + "kv_b_proj.weight", (N * (h + v), R), rows=of_heads),)

    table = {
        "attn_norm": (TensorMapping(layer + "input_layernorm.weight", (D,)),),
        "mlp_norm": (TensorMapping(layer + "post_attention_layernorm.weight", (D,)),),
        "mla.kv_a": roped("kv_a_proj_with_mqa.weight", 1, R + r, D),
        "mla.kv_norm": (TensorMapping(attn + "kv_a_layernorm.weight", (R,)),),
        "mla.w_uk": kv_up(slice(0, h)),
        "mla.w_uv": kv_up(slice(h, h + v)),
        "mla.o": (TensorMapping(attn + "o_proj.weight", (D, N * v)),),
    }
    if c.q_lora_rank is None:
        return table | {"mla.q": roped("q_proj.weight", N, h + r, D)}
    Q = c.q_lora_rank
    return table | {
        "mla.q_a": (TensorMapping(attn + "q_a_proj.weight", (Q, D)),),
        "mla.q_norm": (TensorMapping(attn + "q_a_layernorm.weight", (Q,)),),
        "mla.q_b": roped("q_b_proj.weight", N, h + r, Q),
    }


def _mlp(name: str, D: int, F: int) -> dict[str, tuple[TensorMapping, ...]]:
    return {
        "gate_up": (  # [2, F, D]
            TensorMapping(name + "gate_proj.weight", (F, D), np.s_[0:1, :, :]),
            TensorMapping(name + "up_proj.weight", (F, D), np.s_[1:2, :, :]),
        ),
        "down": (TensorMapping(name + "down_proj.weight", (D, F)),),
    }


def _dense_mlp(c: ModelConfig) -> dict[str, tuple[TensorMapping, ...]]:
    table = _mlp("model.layers.{layer}.mlp.", c.hidden_size, c.intermediate_size)
    return {f"mlp.{path}": mappings for path, mappings in table.items()}


def _moe_mlp(c: ModelConfig) -> dict[str, tuple[TensorMapping, ...]]:
    mlp = "model.layers.{layer}.mlp."
    D, E, F = c.hidden_size, c.n_routed_experts, c.moe_intermediate_size
    experts = _mlp(mlp + "experts.{expert}.", D, F)
    table = {
        "mlp.router": (TensorMapping(mlp + "gate.weight", (E, D), transposed=True),),
        **{f"mlp.{path}": mappings for path, mappings in experts.items()},
    }
    if c.routing_bias:
        table["mlp.bias"] = (TensorMapping(mlp + "gate.e_score_correction_bias", (E,)),)
    if c.n_shared_experts:
        shared = _mlp(mlp + "shared_experts.", D, c.n_shared_experts * F)
        table |= {f"mlp.shared.{path}": mappings for path, mappings in shared.items()}
    return table


def stacked_layers(path: str, config: ModelConfig) -> range | None:
    """The model's layers that the parameter `path` stacks; None if it belongs to no layer.

    A path of the MTP layer counts as the layer after the last.
    """
    match path.split("."):
        case "dense", *_:
            return range(config.num_dense_layers)
        case "moe", *_:
            return range(config.num_dense_layers, config.num_layers)
        case "mtp", "layer", *_:
            return range(config.num_layers, config.num_layers + 1)
        case _:
            return None


def expected_shapes(config: ModelConfig, *, mtp: bool = False) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors that a checkpoint of this model must have; with `mtp`, also those of the MTP layer."""
    return {
        mapping.name.format(layer=layer, expert=expert): mapping.stored_shape
        for path, mappings in tensor_mappings(config).items()
        if mtp or not path.startswith("mtp.")
        for layer in stacked_layers(path, config) or (None,)
        for mapping in mappings
        for expert in range(config.n_routed_experts if mapping.routed else 1)
    }
