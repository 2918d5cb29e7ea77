"""The table from Hugging Face tensor names to parameters.

A checkpoint stores matrices as [outputs, inputs]; parameters are [inputs, ...outputs]. Heads get a dimension of their own;
layers and experts are stacked.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Container
from typing import Any

import numpy as np
from numpy.typing import NDArray

from jax_mla_cp.config.model import ModelConfig

Transform = Callable[[NDArray[Any]], NDArray[Any]]


@dataclasses.dataclass(frozen=True)
class TensorMapping:
    """A checkpoint tensor and the part of a parameter that it fills.

    `index` and the result of `transform` have the dimensions of one layer (and one expert) of the parameter, without the
    stacked ones.
    """

    name: str
    """May contain {layer} and {expert}."""
    stored_shape: tuple[int, ...]
    """Shape in the checkpoint."""
    transform: Transform
    """From the checkpoint's layout to the parameter's; returns a NumPy view where possible.

    For a quantized matrix it is also applied to the scales, which are smaller along the dimensions that `ParamFactory.matrix`
    lists in `blocks`; it must not split those dimensions.
    """
    index: tuple[slice, ...] = ()
    """The part of the parameter that the tensor fills; () is all of it."""

    @property
    def routed(self) -> bool:
        return "{expert}" in self.name


def tensor_mappings(config: ModelConfig) -> dict[str, tuple[TensorMapping, ...]]:
    """Maps each parameter (`Decoder`'s attributes, joined with dots) to the tensors that fill it."""
    c = config
    table: dict[str, tuple[TensorMapping, ...]] = {
        "embed": (TensorMapping("model.embed_tokens.weight", (c.vocab_size, c.hidden_size), _same),),
        "final_norm": (TensorMapping("model.norm.weight", (c.hidden_size,), _same),),
    }
    if not c.tie_word_embeddings:
        table["head"] = (TensorMapping("lm_head.weight", (c.vocab_size, c.hidden_size), np.transpose),)
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
        "mtp.embed_norm": (TensorMapping(name + "enorm.weight", (D,), _same),),
        "mtp.hidden_norm": (TensorMapping(name + "hnorm.weight", (D,), _same),),
        "mtp.project": (TensorMapping(name + "eh_proj.weight", (D, 2 * D), np.transpose),),
        "mtp.final_norm": (TensorMapping(name + "shared_head.norm.weight", (D,), _same),),
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

    def deinterleave(w: NDArray[Any]) -> NDArray[Any]:
        """Reorders the rope rows [.., r, inputs] from pairs (0, 1), (2, 3) .. to pairs (i, i + r/2)."""
        if not c.rope.interleaved:
            return w
        rows = np.arange(w.shape[-2])
        rows[-r:] = np.concatenate([rows[-r::2], rows[-r + 1 :: 2]])
        return w[..., rows, :]

    def query(name: str, inputs: int) -> tuple[TensorMapping, ...]:
        stored = (N * (h + r), inputs)
        return (TensorMapping(attn + name, stored, lambda w: deinterleave(w.reshape(N, h + r, -1)).transpose(2, 0, 1)),)

    def kv_up(rows: slice) -> tuple[TensorMapping, ...]:
        stored = (N * (h + v), R)
        return (
            TensorMapping(
                attn + "kv_b_proj.weight", stored, lambda w: w.reshape(N, h + v, -1)[:, rows].transpose(2, 0, 1)
            ),
        )

    table = {
        "attn_norm": (TensorMapping(layer + "input_layernorm.weight", (D,), _same),),
        "mlp_norm": (TensorMapping(layer + "post_attention_layernorm.weight", (D,), _same),),
        "mla.kv_a": (TensorMapping(attn + "kv_a_proj_with_mqa.weight", (R + r, D), lambda w: deinterleave(w).T),),
        "mla.kv_norm": (TensorMapping(attn + "kv_a_layernorm.weight", (R,), _same),),
        "mla.w_uk": kv_up(slice(0, h)),
        "mla.w_uv": kv_up(slice(h, h + v)),
        "mla.o": (TensorMapping(attn + "o_proj.weight", (D, N * v), lambda w: w.reshape(-1, N, v).transpose(1, 2, 0)),),
    }
    if c.q_lora_rank is None:
        return table | {"mla.q": query("q_proj.weight", D)}
    Q = c.q_lora_rank
    return table | {
        "mla.q_a": (TensorMapping(attn + "q_a_proj.weight", (Q, D), np.transpose),),
        "mla.q_norm": (TensorMapping(attn + "q_a_layernorm.weight", (Q,), _same),),
        "mla.q_b": query("q_b_proj.weight", Q),
    }


def _mlp(name: str, D: int, F: int) -> dict[str, tuple[TensorMapping, ...]]:
    return {
        "gate_up": (  # [D, 2, F]
            TensorMapping(name + "gate_proj.weight", (F, D), lambda w: w.T[:, None], np.s_[:, 0:1, :]),
            TensorMapping(name + "up_proj.weight", (F, D), lambda w: w.T[:, None], np.s_[:, 1:2, :]),
        ),
        "down": (TensorMapping(name + "down_proj.weight", (D, F), np.transpose),),
    }


def _dense_mlp(c: ModelConfig) -> dict[str, tuple[TensorMapping, ...]]:
    table = _mlp("model.layers.{layer}.mlp.", c.hidden_size, c.intermediate_size)
    return {f"mlp.{path}": mappings for path, mappings in table.items()}


def _moe_mlp(c: ModelConfig) -> dict[str, tuple[TensorMapping, ...]]:
    mlp = "model.layers.{layer}.mlp."
    expert = mlp + "experts.{expert}."
    D, E, F = c.hidden_size, c.n_routed_experts, c.moe_intermediate_size
    table = {
        "mlp.router": (TensorMapping(mlp + "gate.weight", (E, D), np.transpose),),
        "mlp.gate_up": (  # [D, 2 F] of one expert
            TensorMapping(expert + "gate_proj.weight", (F, D), np.transpose, np.s_[:, :F]),
            TensorMapping(expert + "up_proj.weight", (F, D), np.transpose, np.s_[:, F:]),
        ),
        "mlp.down": (TensorMapping(expert + "down_proj.weight", (D, F), np.transpose),),
    }
    if c.routing_bias:
        table["mlp.bias"] = (TensorMapping(mlp + "gate.e_score_correction_bias", (E,), _same),)
    if c.n_shared_experts:
        shared = _mlp(mlp + "shared_experts.", D, c.n_shared_experts * F)
        table |= {f"mlp.shared.{path}": mappings for path, mappings in shared.items()}
    return table


def _same(w: NDArray[Any]) -> NDArray[Any]:
    return w


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
