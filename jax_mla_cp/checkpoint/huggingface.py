"""Which Hugging Face tensor goes where in which parameter: one table.

The checkpoint stores matrices as [outputs, inputs], ours are [inputs, ...outputs]; per-head outputs get dimensions of
their own, and layers (and experts) are stacked.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from jax_mla_cp.config.model import ModelConfig

View = Callable[[NDArray[Any]], NDArray[Any]]


@dataclasses.dataclass(frozen=True)
class Piece:
    """A checkpoint tensor and its place in a parameter.

    `at` and `view`'s result speak of one layer (and one expert) of the parameter: the dimensions that are left when the
    stacked ones are taken away.
    """

    name: str
    """May contain {layer} and {expert}."""
    stored: tuple[int, ...]
    """Shape in the checkpoint."""
    view: View
    """From the stored layout to the parameter's; a NumPy view where that can be.

    Of a quantized matrix it also takes the scales, which have fewer elements along the dimensions that `ParamFactory.matrix` calls
    `blocks`: those it must not divide.
    """
    at: tuple[slice, ...] = ()
    """The part of the parameter that it fills; () is all of it."""

    @property
    def routed(self) -> bool:
        return "{expert}" in self.name


def pieces(config: ModelConfig) -> dict[str, tuple[Piece, ...]]:
    """Parameter path (`Decoder`'s attributes, joined with dots) -> what it is made of."""
    c = config
    table: dict[str, tuple[Piece, ...]] = {
        "embed": (Piece("model.embed_tokens.weight", (c.vocab_size, c.hidden_size), _same),),
        "final_norm": (Piece("model.norm.weight", (c.hidden_size,), _same),),
    }
    if not c.tie_word_embeddings:
        table["head"] = (Piece("lm_head.weight", (c.vocab_size, c.hidden_size), np.transpose),)
    stacks = {"dense": (c.num_dense_layers, _dense_mlp), "moe": (c.num_moe_layers, _moe_mlp)}
    for stack, (layers, mlp) in stacks.items():
        if layers:
            table |= {f"{stack}.{path}": made_of for path, made_of in (_attention(c) | mlp(c)).items()}
    if c.num_mtp_layers:
        table |= _mtp(c)
    return {
        path: tuple(dataclasses.replace(piece, name=c.weight_prefix + piece.name) for piece in made_of)
        for path, made_of in table.items()
    }


def _mtp(c: ModelConfig) -> dict[str, tuple[Piece, ...]]:
    """The first layer for multi-token prediction. Its own copies of embedding and head are not read."""
    name, D = f"model.layers.{c.num_layers}.", c.hidden_size
    mlp = _moe_mlp(c) if c.n_routed_experts else _dense_mlp(c)
    return {
        "mtp.embed_norm": (Piece(name + "enorm.weight", (D,), _same),),
        "mtp.hidden_norm": (Piece(name + "hnorm.weight", (D,), _same),),
        "mtp.project": (Piece(name + "eh_proj.weight", (D, 2 * D), np.transpose),),
        "mtp.final_norm": (Piece(name + "shared_head.norm.weight", (D,), _same),),
    } | {f"mtp.layer.{path}": made_of for path, made_of in (_attention(c) | mlp).items()}


def mtp_marker(config: ModelConfig) -> str:
    """The tensor that only a layer for multi-token prediction has: the first one's."""
    return f"{config.weight_prefix}model.layers.{config.num_layers}.eh_proj.weight"


def _attention(c: ModelConfig) -> dict[str, tuple[Piece, ...]]:
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

    def halves(w: NDArray[Any]) -> NDArray[Any]:
        """Reorders the rope rows [.., r, inputs] from pairs (0, 1), (2, 3) .. to pairs (i, i + r/2)."""
        if not c.rope.interleaved:
            return w
        rows = np.arange(w.shape[-2])
        rows[-r:] = np.concatenate([rows[-r::2], rows[-r + 1 :: 2]])
        return w[..., rows, :]

    def query(name: str, inputs: int) -> tuple[Piece, ...]:
        stored = (N * (h + r), inputs)
        return (Piece(attn + name, stored, lambda w: halves(w.reshape(N, h + r, -1)).transpose(2, 0, 1)),)

    def up(take: slice) -> tuple[Piece, ...]:
        stored = (N * (h + v), R)
        return (
            Piece(attn + "kv_b_proj.weight", stored, lambda w: w.reshape(N, h + v, -1)[:, take].transpose(2, 0, 1)),
        )

    table = {
        "attn_norm": (Piece(layer + "input_layernorm.weight", (D,), _same),),
        "mlp_norm": (Piece(layer + "post_attention_layernorm.weight", (D,), _same),),
        "mla.kv_a": (Piece(attn + "kv_a_proj_with_mqa.weight", (R + r, D), lambda w: halves(w).T),),
        "mla.kv_norm": (Piece(attn + "kv_a_layernorm.weight", (R,), _same),),
        "mla.w_uk": up(slice(0, h)),
        "mla.w_uv": up(slice(h, h + v)),
        "mla.o": (Piece(attn + "o_proj.weight", (D, N * v), lambda w: w.reshape(-1, N, v).transpose(1, 2, 0)),),
    }
    if c.q_lora_rank is None:
        return table | {"mla.q": query("q_proj.weight", D)}
    Q = c.q_lora_rank
    return table | {
        "mla.q_a": (Piece(attn + "q_a_proj.weight", (Q, D), np.transpose),),
        "mla.q_norm": (Piece(attn + "q_a_layernorm.weight", (Q,), _same),),
        "mla.q_b": query("q_b_proj.weight", Q),
    }


def _mlp(name: str, D: int, F: int) -> dict[str, tuple[Piece, ...]]:
    return {
        "gate_up": (  # [D, 2, F]
            Piece(name + "gate_proj.weight", (F, D), lambda w: w.T[:, None], np.s_[:, 0:1, :]),
            Piece(name + "up_proj.weight", (F, D), lambda w: w.T[:, None], np.s_[:, 1:2, :]),
        ),
        "down": (Piece(name + "down_proj.weight", (D, F), np.transpose),),
    }


def _dense_mlp(c: ModelConfig) -> dict[str, tuple[Piece, ...]]:
    made_of = _mlp("model.layers.{layer}.mlp.", c.hidden_size, c.intermediate_size)
    return {f"mlp.{path}": made for path, made in made_of.items()}


def _moe_mlp(c: ModelConfig) -> dict[str, tuple[Piece, ...]]:
    mlp = "model.layers.{layer}.mlp."
    expert = mlp + "experts.{expert}."
    D, E, F = c.hidden_size, c.n_routed_experts, c.moe_intermediate_size
    table = {
        "mlp.router": (Piece(mlp + "gate.weight", (E, D), np.transpose),),
        "mlp.gate_up": (  # [D, 2 F] of one expert
            Piece(expert + "gate_proj.weight", (F, D), np.transpose, np.s_[:, :F]),
            Piece(expert + "up_proj.weight", (F, D), np.transpose, np.s_[:, F:]),
        ),
        "mlp.down": (Piece(expert + "down_proj.weight", (D, F), np.transpose),),
    }
    if c.routing_bias:
        table["mlp.bias"] = (Piece(mlp + "gate.e_score_correction_bias", (E,), _same),)
    if c.n_shared_experts:
        shared = _mlp(mlp + "shared_experts.", D, c.n_shared_experts * F)
        table |= {f"mlp.shared.{path}": made for path, made in shared.items()}
    return table


def _same(w: NDArray[Any]) -> NDArray[Any]:
    return w


def layers_of(path: str, config: ModelConfig) -> range | None:
    """The model's layers that the parameter `path` stacks; None if it belongs to no layer."""
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
    """Every tensor that a checkpoint of this model must have, with its shape there; `mtp`: the MTP layer's too."""
    return {
        piece.name.format(layer=layer, expert=expert): piece.stored
        for path, made_of in pieces(config).items()
        if mtp or not path.startswith("mtp.")
        for layer in layers_of(path, config) or (None,)
        for piece in made_of
        for expert in range(config.n_routed_experts if piece.routed else 1)
    }
