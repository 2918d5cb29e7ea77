"""The routers of DeepSeek-V2 and V3: each token's experts and their weights.

After the product with the router's matrix, everything up to the weights is one kernel on Hopper GPUs (ffi/router/route.cu), where
XLA makes a dozen: in a decode step each costs its launch.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int32

from jax_mla_cp import extension
from jax_mla_cp.attention.numerics import einsum_float32
from jax_mla_cp.config.model import ModelConfig

_MAX_EXPERTS, _MAX_TOP = 512, 32  # ffi/router/route.h


def route(
    x: Float[Array, "T D"],
    router: Float[Array, "D E"],
    bias: Float[Array, "*L E"] | None,
    config: ModelConfig,
    *,
    layer: Int32[Array, ""] | int = 0,
    valid: Bool[Array, " T"] | None = None,
    no_expert: int = 0,
    kernels: bool = False,
) -> tuple[Int32[Array, "T k"], Float[Array, "T k"]]:
    """Each token's experts, in ascending order, and their weights, in float32 at full precision: rounding could change which
    expert is selected.

    - `noaux_tc` (MoEGate of DeepSeek-V3's modeling_deepseek.py; arXiv:2412.19437, section 2.1.2): scores are sigmoids.
      The bias takes part in the choice only: the `topk_group` groups whose two largest biased scores have the largest
      sum, and among their experts the top k. Weights are the unbiased scores.
    - `group_limited_greedy` (MoEGate of DeepSeek-V2's; arXiv:2405.04434, section 2.2.2): scores are a softmax over all
      experts, there is no bias, and a group's score is its largest.
    - `greedy` (DeepSeek-V2-Lite): the same without groups.

    Experts of other groups are masked with -inf. DeepSeek-V2's code has 0 there, which is the same: its scores are
    positive, and one that rounds to 0 weighs nothing, whichever expert it is of.

    Args:
      bias: of this layer alone, or of a whole stack of layers.
      layer: the layer's index in it.
      valid: tokens that are not get `no_expert` k times.
      kernels: as `Build.kernels`.
    """
    if bias is not None:
        bias = bias.reshape(-1, bias.shape[-1])
    groups = max(config.n_group, config.experts_per_token)
    if kernels and router.shape[1] <= _MAX_EXPERTS and groups <= _MAX_TOP:
        valid = jnp.ones(len(x), jnp.bool_) if valid is None else valid
        return _by_kernel(_logits(x, router), bias, config, layer, valid, no_expert)
    logits = _logits(x, router).sum(1)
    expert, weight = _choose(logits, None if bias is None else bias[layer], config)
    if valid is not None:
        expert = jnp.where(valid[:, None], expert, no_expert)
    expert, weight = lax.sort((expert, weight), dimension=1, num_keys=1)
    return expert, weight


def _by_kernel(
    logits: Float[Array, "T P E"],
    bias: Float[Array, "L E"] | None,
    config: ModelConfig,
    layer: Int32[Array, ""] | int,
    valid: Bool[Array, " T"],
    no_expert: int,
) -> tuple[Int32[Array, "T k"], Float[Array, "T k"]]:
    c = config
    shape = (len(logits), c.experts_per_token)
    results = (jax.ShapeDtypeStruct(shape, jnp.int32), jax.ShapeDtypeStruct(shape, jnp.float32))
    none = jnp.zeros((0, c.n_routed_experts), jnp.float32)
    expert, weight = extension.call(
        "route",
        results,
        logits,
        none if bias is None else bias,
        extension.index_operand(layer),
        valid,
        groups=np.int64(c.n_group),
        kept_groups=np.int64(c.topk_group if c.n_group > 1 else 1),
        sigmoid=bias is not None,
        normalize=c.norm_topk_prob,
        scale=np.float32(c.routed_scaling_factor),
        no_expert=np.int32(no_expert),
    )
    return expert, weight


def _choose(
    logits: Float[Array, "T E"], bias: Float[Array, " E"] | None, config: ModelConfig
) -> tuple[Int32[Array, "T k"], Float[Array, "T k"]]:
    c = config
    scores = jax.nn.softmax(logits, axis=-1) if bias is None else jax.nn.sigmoid(logits)
    choice = scores if bias is None else scores + bias
    if c.n_group > 1:
        grouped = choice.reshape(*choice.shape[:-1], c.n_group, -1)
        top = _top_k(grouped, 1 if bias is None else 2)
        group_score = jnp.take_along_axis(grouped, top, axis=-1).sum(-1)
        kept = jax.nn.one_hot(_top_k(group_score, c.topk_group), c.n_group, dtype=jnp.bool_).any(-2)
        choice = jnp.where(kept[..., None], grouped, -jnp.inf).reshape(choice.shape)
    expert = _top_k(choice, c.experts_per_token)
    weight = jnp.take_along_axis(scores, expert, axis=-1)
    if c.norm_topk_prob:
        weight = weight / (weight.sum(-1, keepdims=True) + 1e-20)
    return expert, weight * c.routed_scaling_factor


def _logits(x: Float[Array, "T D"], router: Float[Array, "D E"]) -> Float[Array, "T P E"]:
    """`x @ router`, as exact as in float32, as P parts to be added.

    For a bfloat16 x each of the router's numbers is the sum of three bfloat16 ones: their products with x are exact in
    float32, and three products on the tensor cores take a fraction of the time of one in float32.
    """
    if x.dtype != jnp.bfloat16:
        return jnp.dot(x.astype(jnp.float32), router, precision=lax.Precision.HIGHEST)[:, None]
    parts, rest = [], router
    for _ in range(3):
        # Not astype there and back, which XLA may leave out.
        part = lax.reduce_precision(rest, exponent_bits=8, mantissa_bits=7)
        parts.append(part.astype(jnp.bfloat16))
        rest = rest - part
    return einsum_float32("td,dpe->tpe", x, jnp.stack(parts, axis=1))


def _top_k(values: Float[Array, "*T n"], k: int) -> Int32[Array, "*T k"]:
    """The indices of the k largest values, as `lax.top_k` gives them, which on GPUs sorts all values; the first of equal ones.

    At least k values must be above -inf (`ModelConfig` checks that the chosen groups have k experts).
    """
    index = lax.broadcasted_iota(jnp.int32, values.shape, values.ndim - 1)
    top = []
    for _ in range(k):
        top.append(jnp.argmax(values, axis=-1).astype(jnp.int32))
        values = jnp.where(index == top[-1][..., None], -jnp.inf, values)
    return jnp.stack(top, axis=-1)
