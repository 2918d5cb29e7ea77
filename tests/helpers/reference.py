"""DeepSeek-V2 and V3 in float64 NumPy: what every other implementation here is measured against.

Written from the equations (arXiv:2405.04434 and 2412.19437, section 2; YaRN: arXiv:2309.00071) for one sequence at a time, with
loops where a loop reads best. It shares no code with `jax_mla_cp` but `ModelConfig`'s fields, and works on a
checkpoint's own names and shapes.

Letters: S tokens, D hidden, N heads, h/r key dims without/with rotary embedding, v value dim, R latent dim,
V vocabulary, E experts, K chosen.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from jax_mla_cp.config.model import ModelConfig

F64 = NDArray[np.float64]
Weights = Mapping[str, np.ndarray]

LORA_NORM_EPS = 1e-6
"""DeepSeek-V3 builds the norms of the two compressed vectors with RMSNorm's default, whatever `rms_norm_eps` says."""


@dataclasses.dataclass(frozen=True)
class Result:
    """All that a forward pass of one sequence computes that a test may want."""

    logits: F64
    """[S, V]"""
    latents: F64
    """[layers, S, R + r]: the normed latent, then the rotated shared key, the first components of all pairs first."""
    hidden: F64
    """[layers + 1, S, D]: the residual stream, before the first layer and after each."""
    experts: NDArray[np.int64]
    """[MoE layers, S, K], ascending in each row."""
    router_margin: F64
    """[MoE layers, S]: how far the scores are from another choice of groups or experts."""


def forward(config: ModelConfig, weights: Weights, tokens: Sequence[int] | NDArray[np.integer]) -> Result:
    """Runs one sequence from position 0.

    Args:
      weights: a checkpoint's tensors by their Hugging Face names, `[out, in]`, of any float type.
      tokens: [S] ids below the vocabulary's size.
    """
    w = {n: np.asarray(value, np.float64) for n, value in _below(weights, config.weight_prefix).items()}
    x = w["model.embed_tokens.weight"][np.asarray(tokens)]
    hidden, latents, experts, margins = [x], [], [], []
    for i in range(config.num_layers):
        layer = _below(w, f"model.layers.{i}.")
        attended, latent = _attention(config, layer, rms_norm(x, layer["input_layernorm.weight"], config.rms_norm_eps))
        x = x + attended
        normed = rms_norm(x, layer["post_attention_layernorm.weight"], config.rms_norm_eps)
        mlp = _below(layer, "mlp.")
        if "gate.weight" in mlp:
            added, chosen, margin = _moe(config, mlp, normed)
            experts.append(chosen)
            margins.append(margin)
        else:
            added = _mlp(mlp, normed)
        x = x + added
        hidden.append(x)
        latents.append(latent)
    head = w["model.embed_tokens.weight" if config.tie_word_embeddings else "lm_head.weight"]
    logits = rms_norm(x, w["model.norm.weight"], config.rms_norm_eps) @ head.T
    empty = (0, len(x))
    return Result(
        logits=logits,
        latents=np.stack(latents),
        hidden=np.stack(hidden),
        experts=np.stack(experts) if experts else np.zeros((*empty, config.experts_per_token), np.int64),
        router_margin=np.stack(margins) if margins else np.zeros(empty),
    )


@dataclasses.dataclass(frozen=True)
class MtpResult:
    """Output of the layer for multi-token prediction for one sequence."""

    hidden: F64
    """[S, D]: after its norm."""
    logits: F64
    """[S, V]: those of the token two places on."""
    latents: F64
    """[S, R + r], as in `Result`."""


def mtp(config: ModelConfig, weights: Weights, hidden: F64, next_tokens: Sequence[int]) -> MtpResult:
    """The layer behind the last one (arXiv:2412.19437, section 2.2), from position 0.

    Args:
      hidden: [S, D] states after the model's final norm, or of this layer's own.
      next_tokens: [S] the token after each.
    """
    w = {name: np.asarray(value, np.float64) for name, value in weights.items()}
    layer, eps = _below(w, f"model.layers.{config.num_layers}."), config.rms_norm_eps
    embedded = rms_norm(w["model.embed_tokens.weight"][np.asarray(next_tokens)], layer["enorm.weight"], eps)
    x = np.concatenate([embedded, rms_norm(hidden, layer["hnorm.weight"], eps)], -1) @ layer["eh_proj.weight"].T
    attended, latents = _attention(config, layer, rms_norm(x, layer["input_layernorm.weight"], eps))
    x = x + attended
    x = x + _moe(config, _below(layer, "mlp."), rms_norm(x, layer["post_attention_layernorm.weight"], eps))[0]
    out = rms_norm(x, layer["shared_head.norm.weight"], eps)
    return MtpResult(out, out @ w["lm_head.weight"].T, latents)


def propose(config: ModelConfig, weights: Weights, tokens: Sequence[int], count: int) -> tuple[list[int], MtpResult]:
    """`count` guesses at what follows the tokens, each from the state before it; and the layer's last pass, over all."""
    final = np.asarray(weights["model.norm.weight"], np.float64)
    hidden = rms_norm(forward(config, weights, tokens[:-1]).hidden[-1], final, config.rms_norm_eps)
    following = list(tokens[1:])
    for _ in range(count):
        result = mtp(config, weights, hidden, following)
        following.append(int(result.logits[-1].argmax()))
        hidden = np.concatenate([hidden, result.hidden[-1:]])
    return following[len(tokens) - 1 :], result


def attention_f64(q: ArrayLike, k: ArrayLike, v: ArrayLike, q_pos: ArrayLike, scale: float) -> F64:
    """Softmax attention by brute force: query i sees the keys at positions 0 to `q_pos[i]`.

    Args:
      q: [T, N, d] queries.
      k: [S, N, d] keys, the one at position j in row j; [S, 1, d] or [S, d] is shared by all heads.
      v: [S, N, e] values, or shared likewise.
      q_pos: [T] positions. A negative one sees nothing, and its output is 0.
      scale: multiplies the scores.

    Returns:
      [T, N, e] in float64.
    """
    q, k, v = (np.asarray(a).astype(np.float64) for a in (q, k, v))
    k, v = (a[:, None] if a.ndim == 2 else a for a in (k, v))
    k, v = (np.broadcast_to(a, (len(a), q.shape[1], a.shape[2])) for a in (k, v))
    out = np.zeros((len(q), q.shape[1], v.shape[2]))
    for i, last in enumerate(np.asarray(q_pos)):
        if last >= len(k):
            raise ValueError(f"q_pos[{i}]={last} needs {last + 1} keys, got {len(k)}.")
        if last < 0:
            continue
        # Sliced, not masked: what lies in later rows, NaN included, can't reach the output.
        scores = scale * np.einsum("nd,snd->ns", q[i], k[: last + 1])
        p = np.exp(scores - scores.max(-1, keepdims=True))
        out[i] = np.einsum("ns,sne->ne", p / p.sum(-1, keepdims=True), v[: last + 1])
    return out


def rms_norm(x: F64, weight: F64, eps: float) -> F64:
    """`[..., D]`, each vector divided by its root mean square."""
    return np.asarray(weight * x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + eps))


def rope_frequencies(config: ModelConfig) -> F64:
    """[r / 2] radians per position of each pair, YaRN's blend included."""
    rope, r = config.rope, config.qk_rope_head_dim
    plain = rope.theta ** (-np.arange(0, r, 2) / r)
    if not rope.yarn:
        return plain

    def pair_that_turns(times: float) -> float:
        """The (fractional) pair that makes so many turns over the original context."""
        return r * math.log(rope.original_max_position / (times * 2 * math.pi)) / (2 * math.log(rope.theta))

    low = max(math.floor(pair_that_turns(rope.beta_fast)), 0)
    high = min(math.ceil(pair_that_turns(rope.beta_slow)), r - 1)
    # Fast pairs stay as they are, slow ones are slowed down by `factor`, in between a ramp.
    slow = np.clip((np.arange(r // 2) - low) / (high - low if high != low else 0.001), 0, 1)
    return plain * (1 - slow) + plain / rope.factor * slow


def rope_amplitude(config: ModelConfig) -> float:
    """YaRN's factor of cos and sin."""
    rope = config.rope
    if not rope.yarn:
        return 1.0
    if rope.mscale and rope.mscale_all_dim:
        return _temperature(rope.factor, rope.mscale) / _temperature(rope.factor, rope.mscale_all_dim)
    return _temperature(rope.factor, 1.0)


def softmax_scale(config: ModelConfig) -> float:
    """One over the root of the key's dim, times YaRN's temperature squared (once for the query, once for the key)."""
    scale = 1 / math.sqrt(config.qk_nope_head_dim + config.qk_rope_head_dim)
    if config.rope.yarn and config.rope.mscale_all_dim:
        scale *= _temperature(config.rope.factor, config.rope.mscale_all_dim) ** 2
    return scale


def _temperature(factor: float, mscale: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def rotate(config: ModelConfig, x: F64) -> F64:
    """Rotates `[S, ..., r]`, row s by position s; the result has the first components of all pairs first."""
    half = config.qk_rope_head_dim // 2
    # A checkpoint has a pair's two components side by side (DeepSeek's) or half a vector apart.
    first, second = (x[..., 0::2], x[..., 1::2]) if config.rope.interleaved else (x[..., :half], x[..., half:])
    angle = np.arange(len(x))[:, None] * rope_frequencies(config)
    angle = angle.reshape(len(x), *[1] * (x.ndim - 2), half)
    cos, sin = (rope_amplitude(config) * f(angle) for f in (np.cos, np.sin))
    return np.concatenate([first * cos - second * sin, second * cos + first * sin], -1)


def _attention(config: ModelConfig, layer: Weights, x: F64) -> tuple[F64, F64]:
    """MLA as the paper writes it, keys and values expanded: `[S, D]` to its output and the latents `[S, R + r]`."""
    w = _below(layer, "self_attn.")
    n, h, r, v = config.num_heads, config.qk_nope_head_dim, config.qk_rope_head_dim, config.v_head_dim
    if config.q_lora_rank is None:
        q = x @ w["q_proj.weight"].T
    else:
        compressed = rms_norm(x @ w["q_a_proj.weight"].T, w["q_a_layernorm.weight"], LORA_NORM_EPS)
        q = compressed @ w["q_b_proj.weight"].T
    q = q.reshape(-1, n, h + r)
    q = np.concatenate([q[..., :h], rotate(config, q[..., h:])], -1)

    down = x @ w["kv_a_proj_with_mqa.weight"].T
    latent = rms_norm(down[:, : config.kv_lora_rank], w["kv_a_layernorm.weight"], LORA_NORM_EPS)
    shared_key = rotate(config, down[:, config.kv_lora_rank :])
    up = (latent @ w["kv_b_proj.weight"].T).reshape(-1, n, h + v)
    k = np.concatenate([up[..., :h], np.repeat(shared_key[:, None], n, axis=1)], -1)

    out = attention_f64(q, k, up[..., h:], np.arange(len(x)), softmax_scale(config))
    return out.reshape(len(x), n * v) @ w["o_proj.weight"].T, np.concatenate([latent, shared_key], -1)


def _mlp(w: Weights, x: F64) -> F64:
    gate, up = x @ w["gate_proj.weight"].T, x @ w["up_proj.weight"].T
    silu = gate / (1 + np.exp(-gate))
    return np.asarray((silu * up) @ w["down_proj.weight"].T)


def _moe(config: ModelConfig, w: Weights, x: F64) -> tuple[F64, NDArray[np.int64], F64]:
    """`[S, D]` to the experts' sum, the experts chosen `[S, K]` and the choice's margin `[S]`."""
    logits = x @ w["gate.weight"].T
    if config.topk_method == "noaux_tc":
        scores = 1 / (1 + np.exp(-logits))
        chosen, margin = choose_experts(config, scores + w["gate.e_score_correction_bias"])
    else:
        scores = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
        chosen, margin = choose_experts(config, scores)
    out = _mlp(_below(w, "shared_experts."), x) if config.n_shared_experts else np.zeros_like(x)
    for s, experts in enumerate(chosen):
        # The bias takes part in the choice only.
        share = scores[s, experts]
        if config.norm_topk_prob:
            share = share / (share.sum() + 1e-20)
        for expert, factor in zip(experts, share * config.routed_scaling_factor, strict=True):
            out[s] += factor * _mlp(_below(w, f"experts.{expert}."), x[s])
    return out, chosen, margin


def choose_experts(config: ModelConfig, biased: F64) -> tuple[NDArray[np.int64], F64]:
    """The best experts of the best groups: scores `[S, E]`, V3's biased, to ascending ids `[S, K]` and margins `[S]`."""
    size = config.n_routed_experts // config.n_group
    # A group is as good as its two best experts together, in DeepSeek-V2 as its best expert.
    counted = 2 if config.topk_method == "noaux_tc" else 1
    chosen, margins = [], []
    for row in biased:
        group_scores = np.array([np.sort(group)[-counted:].sum() for group in row.reshape(config.n_group, size)])
        groups, group_margin = _best(group_scores, config.topk_group)
        # -inf, not 0: biased scores may be negative, and an expert of another group must never be chosen.
        allowed = np.full_like(row, -np.inf)
        for group in groups:
            allowed[group * size : (group + 1) * size] = row[group * size : (group + 1) * size]
        experts, expert_margin = _best(allowed, config.experts_per_token)
        chosen.append(experts)
        margins.append(min(group_margin, expert_margin))
    return np.stack(chosen), np.array(margins)


def _best(values: F64, count: int) -> tuple[NDArray[np.int64], float]:
    """The indices of the `count` largest, ascending, and the distance of the worst of them to the best other."""
    order = np.argsort(-values, kind="stable")
    margin = values[order[count - 1]] - values[order[count]] if count < len(values) else np.inf
    return np.sort(order[:count]), float(margin)


def _below(weights: Weights, prefix: str) -> dict[str, np.ndarray]:
    return {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}
