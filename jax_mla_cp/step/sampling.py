"""Logits -> tokens and log-probabilities, on the device.

A random number depends on (seed, position) alone, so that the same request gives the same tokens in any batch, on any
mesh, and after a restart.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int32, UInt32

from jax_mla_cp.batch.arrays import SamplingArrays
from jax_mla_cp.mesh import vary_like
from jax_mla_cp.step import selection
from jax_mla_cp.step.logit_bias import LogitBiasArrays, apply_logit_bias

TOP_LOGPROBS = 20


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SamplerOutput:
    """Per place for a sampled token (`J` of them, one per request without speculation): the token, its log-probability, and
    the most likely tokens with theirs.

    Log-probabilities are those of the model, before temperature and truncation, in float32.
    """

    token: Any  # int32 [J]
    logprob: Any  # float32 [J]
    top_tokens: Any  # int32 [J, min(20, V)]
    top_logprobs: Any  # float32 [J, min(20, V)]
    drafts: Any = None  # int32 [I, d]: each request's next drafts; None without speculation
    prompt_logprobs: TokenLogprobsArrays | None = None  # of steps with StepShape.prompt_logprobs
    table_checksum: Any = None  # uint32 [dp]: of the page table that the step used, if the devices keep it


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TokenLogprobsArrays:
    """Per token of each rank's buffer, as in `SamplerOutput`, for the token after it; undefined where `Batch.next_tokens`
    is -1."""

    logprob: Any  # float32 [T]
    top_tokens: Any  # int32 [T, min(20, V)]
    top_logprobs: Any  # float32 [T, min(20, V)]


def sample(logits: Float[Array, "J V"], params: SamplingArrays, bias: LogitBiasArrays | None = None) -> SamplerOutput:
    """One token per place. Temperature 0 takes the most likely token, the first of equal ones.

    Args:
      bias: changes to the logits that tokens are chosen by. Places without one are sampled as with None.
    """
    logprobs = jax.nn.log_softmax(logits.astype(jnp.float32))
    scores = logprobs if bias is None else apply_logit_bias(logits, logprobs, bias)
    greedy = jnp.argmax(scores, axis=-1).astype(jnp.int32)
    random = lax.cond((params.temperature > 0).any(), _sample_random, lambda *_: greedy, scores, params)
    token = jnp.where(params.temperature > 0, random, greedy)
    return SamplerOutput(token, *gather_logprobs(logprobs, token))


def gather_logprobs(
    logprobs: Float[Array, "J V"], token: Int32[Array, " J"]
) -> tuple[Float[Array, " J"], Int32[Array, "J k"], Float[Array, "J k"]]:
    """The tokens' log-probabilities, and the most likely tokens with theirs: bit-equal for the same token."""
    top_logprobs, top_tokens = selection.top_k(logprobs, min(TOP_LOGPROBS, logprobs.shape[-1]))
    own = jnp.take_along_axis(logprobs, token[:, None], axis=-1)[:, 0]
    # XLA may compute what is gathered a second time, in another order.
    listed = top_tokens == token[:, None]
    own = jnp.where(listed.any(1), jnp.where(listed, top_logprobs, -jnp.inf).max(1), own)
    return own, top_tokens, top_logprobs


def _sample_random(logprobs: jax.Array, params: SamplingArrays) -> Int32[Array, " J"]:
    # argmax(log p + Gumbel noise) is a draw from p.
    noise = jax.vmap(_gumbel, in_axes=(0, 0, None))(params.seed, params.position, logprobs.shape[-1])
    return jnp.argmax(_truncated(logprobs, params) + noise, axis=-1).astype(jnp.int32)


def _truncated(logprobs: Float[Array, "J V"], params: SamplingArrays) -> Float[Array, "J V"]:
    """Logits at the temperature, -inf where nothing may be drawn: by `min_p`, then by `top_k`, then by `top_p`, as in vLLM."""
    # Less the largest, which stays 0: at tiny temperatures the others may overflow to -inf.
    below = logprobs - logprobs.max(-1, keepdims=True)
    scaled = below / jnp.where(params.temperature > 0, params.temperature, 1.0)[:, None]
    scaled = jnp.where(scaled >= jnp.log(params.min_p)[:, None], scaled, -jnp.inf)
    scaled = _apply_mask(scaled, params.top_k > 0, _top_k, params)
    return _apply_mask(scaled, params.top_p < 1, _top_p, params)


def _apply_mask(
    scaled: Float[Array, "J V"],
    truncates: Bool[Array, " J"],
    mask: Callable[[jax.Array, SamplingArrays], jax.Array],
    params: SamplingArrays,
) -> Float[Array, "J V"]:
    """Sets tokens outside of `mask(scaled, params)` to -inf. It has all tokens of a place that does not truncate, so the
    conditional saves time and changes nothing."""

    def keep_all(scaled: jax.Array, params: SamplingArrays) -> jax.Array:
        return vary_like(jnp.ones(scaled.shape, jnp.bool_), scaled, params)

    return jnp.where(lax.cond(truncates.any(), mask, keep_all, scaled, params), scaled, -jnp.inf)


def _top_k(scaled: Float[Array, "J V"], params: SamplingArrays) -> Bool[Array, "J V"]:
    """Mask of the `top_k` most likely tokens, the first of equal ones."""
    limit = jnp.where(params.top_k > 0, params.top_k, jnp.inf)
    return selection.leading(scaled, jnp.ones_like(scaled), limit)


def _top_p(scaled: Float[Array, "J V"], params: SamplingArrays) -> Bool[Array, "J V"]:
    """Mask of the fewest tokens, the most likely first, whose probability reaches `top_p` of what is left; never of none.

    Rounding decides about tokens before which the others' probability is within a few millionths of `top_p`: in one way for
    each shape of the batch, whatever the other places have.
    """
    p = jnp.exp(scaled)
    # Positive: a product of tiny numbers may be flushed to 0.
    limit = jnp.maximum(params.top_p * p.sum(-1), np.finfo(np.float32).tiny)
    return selection.leading(scaled, p, jnp.where(params.top_p < 1, limit, jnp.inf))


def _gumbel(seed: UInt32[Array, " 2"], position: Int32[Array, ""], vocab: int) -> Float[Array, " V"]:
    key = jax.random.fold_in(jax.random.wrap_key_data(seed, impl="threefry2x32"), position)
    return jax.random.gumbel(key, (vocab,), jnp.float32)
