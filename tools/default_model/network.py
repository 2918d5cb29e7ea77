"""The network for training: DeepSeek-V3's, as plain functions of its checkpoint's tensors.

The package's own model is made for serving (a paged cache, loops without a derivative). This one is made for training: whole
sequences, cuDNN attention, all experts for all tokens. tests/tools/ checks that both give the same logits.
Parameters have the names and shapes of a Hugging Face checkpoint, but the experts of a layer are stacked.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import ml_dtypes
from jax import lax

from jax_mla_cp.config.model import ModelConfig
from jax_mla_cp.model.layers import rope_frequencies

Params = dict[str, jax.Array]
QUANTIZED = ("_proj.weight", "_proj_with_mqa.weight")
"""Tensors that DeepSeek-V3's checkpoint has in FP8: all linear layers but eh_proj, router, embedding and head."""
_BLOCK = 128
_FP8_MAX = 448.0


def is_quantized(name: str) -> bool:
    return name.endswith(QUANTIZED) and not name.endswith("eh_proj.weight")


def shapes(c: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Shapes of all parameters. The layer after the last is for multi-token prediction (MTP)."""
    D, N, R, r, h, v, Q = (
        c.hidden_size,
        c.num_heads,
        c.kv_lora_rank,
        c.qk_rope_head_dim,
        c.qk_nope_head_dim,
        c.v_head_dim,
        c.q_lora_rank,
    )
    assert Q is not None
    E, F = c.n_routed_experts, c.moe_intermediate_size
    out: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (c.vocab_size, D),
        "model.norm.weight": (D,),
        "lm_head.weight": (c.vocab_size, D),
    }

    def mlp(name: str, width: int, lead: tuple[int, ...] = ()) -> None:
        out[f"{name}gate_proj.weight"] = (*lead, width, D)
        out[f"{name}up_proj.weight"] = (*lead, width, D)
        out[f"{name}down_proj.weight"] = (*lead, D, width)

    for layer in range(c.num_layers + 1):
        p = f"model.layers.{layer}."
        out |= {
            p + "input_layernorm.weight": (D,),
            p + "post_attention_layernorm.weight": (D,),
            p + "self_attn.q_a_proj.weight": (Q, D),
            p + "self_attn.q_a_layernorm.weight": (Q,),
            p + "self_attn.q_b_proj.weight": (N * (h + r), Q),
            p + "self_attn.kv_a_proj_with_mqa.weight": (R + r, D),
            p + "self_attn.kv_a_layernorm.weight": (R,),
            p + "self_attn.kv_b_proj.weight": (N * (h + v), R),
            p + "self_attn.o_proj.weight": (D, N * v),
        }
        if layer < c.first_k_dense:
            mlp(p + "mlp.", c.intermediate_size)
        else:
            out[p + "mlp.gate.weight"] = (E, D)
            out[p + "mlp.gate.e_score_correction_bias"] = (E,)
            mlp(p + "mlp.experts.", F, (E,))
            mlp(p + "mlp.shared_experts.", F * c.n_shared_experts)
    p = f"model.layers.{c.num_layers}."
    for name in ("enorm", "hnorm", "shared_head.norm"):
        out[p + name + ".weight"] = (D,)
    return out | {p + "eh_proj.weight": (D, 2 * D)}


def initial(config: ModelConfig, key: jax.Array) -> Params:
    """Initial parameters: norms 1, biases 0, matrices normal with 1 / sqrt(inputs), smaller at the ends of residual branches."""
    params = {}
    sizes = shapes(config)
    for k, (name, shape) in zip(jax.random.split(key, len(sizes)), sizes.items(), strict=True):
        if name.endswith("bias"):
            params[name] = jnp.zeros(shape)
        elif len(shape) == 1:
            params[name] = jnp.ones(shape)
        else:
            spread = 0.1 if "embed_tokens" in name else shape[-1] ** -0.5
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                spread /= (2 * config.num_layers) ** 0.5
            params[name] = spread * jax.random.normal(k, shape)
    return params


def quantize(w: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Quantizes to float8_e4m3fn, with a float32 scale per 128 x 128 block of the last two dimensions. Returns both."""
    rows, cols = (-(-n // _BLOCK) for n in w.shape[-2:])
    pad = [(0, 0)] * (w.ndim - 2) + [(0, rows * _BLOCK - w.shape[-2]), (0, cols * _BLOCK - w.shape[-1])]
    blocks = jnp.pad(w, pad).reshape(*w.shape[:-2], rows, _BLOCK, cols, _BLOCK)
    scale = jnp.maximum(jnp.abs(blocks).max((-3, -1)), 1e-12) / _FP8_MAX
    quantized = (blocks / scale[..., :, None, :, None]).astype(ml_dtypes.float8_e4m3fn)
    return quantized.reshape(*w.shape[:-2], rows * _BLOCK, cols * _BLOCK)[..., : w.shape[-2], : w.shape[-1]], scale


def fake_quantize(params: Params) -> Params:
    """Rounds the parameters to their values in FP8, with a straight-through gradient."""

    def straight_through(name: str, w: jax.Array) -> jax.Array:
        if not is_quantized(name):
            return w
        quantized, scale = quantize(w)
        scale = scale.repeat(_BLOCK, -2).repeat(_BLOCK, -1)[..., : w.shape[-2], : w.shape[-1]]
        return w + lax.stop_gradient(quantized.astype(w.dtype) * scale - w)

    return {name: straight_through(name, w) for name, w in params.items()}


def forward(
    params: Params, tokens: jax.Array, c: ModelConfig, *, cudnn: bool
) -> tuple[jax.Array, jax.Array, dict[str, jax.Array]]:
    """Computes the logits of [B, S] token ids.

    Returns: logits of the next token and of the token after it (MTP), both [B, S, V] float32; and the load of each layer's experts,
      by the name of its routing bias: [E], the fraction of all selections.

    MTP at position t reads token t + 1. Its last position reads the first token and must not be used.
    """
    positions = jnp.arange(tokens.shape[1])
    angle = positions[:, None].astype(jnp.float32) * rope_frequencies(c.qk_rope_head_dim, c.rope)
    cos, sin = jnp.cos(angle) * c.rope.amplitude, jnp.sin(angle) * c.rope.amplitude
    embedded = params["model.embed_tokens.weight"][tokens]
    loads: dict[str, jax.Array] = {}

    def layer(x: jax.Array, number: int) -> jax.Array:
        p = f"model.layers.{number}."
        x = x + _attention(params, p + "self_attn.", _norm(x, params[p + "input_layernorm.weight"]), cos, sin, c, cudnn)
        normed = _norm(x, params[p + "post_attention_layernorm.weight"])
        if number < c.first_k_dense:
            return x + _mlp(params, p + "mlp.", normed)
        out, loads[p + "mlp.gate.e_score_correction_bias"] = _moe(params, p + "mlp.", normed, c)
        return x + out

    x = embedded
    for number in range(c.num_layers):
        x = layer(x, number)
    x = _norm(x, params["model.norm.weight"])
    p = f"model.layers.{c.num_layers}."
    ahead = jnp.roll(embedded, -1, axis=1)
    both = [_norm(ahead, params[p + "enorm.weight"]), _norm(x, params[p + "hnorm.weight"])]
    y = layer(jnp.concatenate(both, -1) @ params[p + "eh_proj.weight"].T, c.num_layers)
    y = _norm(y, params[p + "shared_head.norm.weight"])
    head = params["lm_head.weight"].T
    return (x @ head).astype(jnp.float32), (y @ head).astype(jnp.float32), loads


def _norm(x: jax.Array, weight: jax.Array) -> jax.Array:
    wide = x.astype(jnp.float32)
    return (wide * lax.rsqrt((wide * wide).mean(-1, keepdims=True) + 1e-6)).astype(x.dtype) * weight


def _rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Pairs of neighbors, as DeepSeek-V3's checkpoints have them. x: [B, S, heads, r]."""
    a, b = x[..., 0::2], x[..., 1::2]
    cos, sin = cos[:, None].astype(x.dtype), sin[:, None].astype(x.dtype)
    return jnp.stack([a * cos - b * sin, b * cos + a * sin], -1).reshape(x.shape)


def _attention(
    params: Params, p: str, x: jax.Array, cos: jax.Array, sin: jax.Array, c: ModelConfig, cudnn: bool
) -> jax.Array:
    batch, length, _ = x.shape
    N, R, h, v = c.num_heads, c.kv_lora_rank, c.qk_nope_head_dim, c.v_head_dim
    low = _norm(x @ params[p + "q_a_proj.weight"].T, params[p + "q_a_layernorm.weight"])
    q = (low @ params[p + "q_b_proj.weight"].T).reshape(batch, length, N, -1)
    q = jnp.concatenate([q[..., :h], _rotate(q[..., h:], cos, sin)], -1)
    latent = x @ params[p + "kv_a_proj_with_mqa.weight"].T
    shared = _rotate(latent[..., None, R:], cos, sin)
    kv = _norm(latent[..., :R], params[p + "kv_a_layernorm.weight"]) @ params[p + "kv_b_proj.weight"].T
    kv = kv.reshape(batch, length, N, h + v)
    k = jnp.concatenate([kv[..., :h], jnp.broadcast_to(shared, (*kv.shape[:3], c.qk_rope_head_dim))], -1)
    value = jnp.pad(kv[..., h:], [(0, 0)] * 3 + [(0, k.shape[-1] - v)])  # cuDNN needs a single head size
    out = jax.nn.dot_product_attention(
        q, k, value, is_causal=True, scale=c.softmax_scale, implementation="cudnn" if cudnn else None
    )
    return out[..., :v].reshape(batch, length, N * v) @ params[p + "o_proj.weight"].T


def _mlp(params: Params, p: str, x: jax.Array) -> jax.Array:
    gate, up = (x @ params[f"{p}{name}_proj.weight"].T for name in ("gate", "up"))
    return (jax.nn.silu(gate) * up) @ params[p + "down_proj.weight"].T


def _moe(params: Params, p: str, x: jax.Array, c: ModelConfig) -> tuple[jax.Array, jax.Array]:
    """Computes all experts for all tokens; the weights of unselected experts are 0. The experts are small."""
    scores = jax.nn.sigmoid(x.astype(jnp.float32) @ params[p + "gate.weight"].astype(jnp.float32).T)
    choice = lax.stop_gradient(scores + params[p + "gate.e_score_correction_bias"])
    grouped = choice.reshape(*choice.shape[:-1], c.n_group, -1)
    group = lax.top_k(grouped, 2)[0].sum(-1)
    selected_groups = group >= lax.top_k(group, c.topk_group)[0][..., -1:]
    choice = jnp.where(selected_groups[..., None], grouped, -jnp.inf).reshape(choice.shape)
    selected = choice >= lax.top_k(choice, c.experts_per_token)[0][..., -1:]
    weight = jnp.where(selected, scores, 0)
    weight = weight / (weight.sum(-1, keepdims=True) + 1e-20) * c.routed_scaling_factor
    gate, up = (jnp.einsum("bsd,efd->bsef", x, params[f"{p}experts.{name}_proj.weight"]) for name in ("gate", "up"))
    wide = jax.nn.silu(gate) * up * weight[..., None].astype(x.dtype)
    out = jnp.einsum("bsef,edf->bsd", wide, params[p + "experts.down_proj.weight"])
    load = selected.mean((0, 1), dtype=jnp.float32) / c.experts_per_token
    return out + _mlp(params, p + "shared_experts.", x), load
