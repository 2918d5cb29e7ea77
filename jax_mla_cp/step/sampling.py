"""Logits -> tokens and log-probabilities, on the device.

A random number depends on (seed, position) alone, so that the same request gives the same tokens in any batch, on any
mesh, and after a restart.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int32, UInt32

from jax_mla_cp.batch.arrays import SamplingArrays
from jax_mla_cp.mesh import vary_like
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
    top_logprobs, top_tokens = lax.top_k(logprobs, min(TOP_LOGPROBS, logprobs.shape[-1]))
    own = jnp.take_along_axis(logprobs, token[:, None], axis=-1)[:, 0]
    # XLA may compute what is gathered a second time, in another order.
    listed = top_tokens == token[:, None]
    own = jnp.where(listed.any(1), jnp.where(listed, top_logprobs, -jnp.inf).max(1), own)
    return own, top_tokens, top_logprobs


def _sample_random(logprobs: jax.Array, params: SamplingArrays) -> Int32[Array, " J"]:
    # Less the largest, which stays 0: at tiny temperatures the others may overflow to -inf.
    below = logprobs - logprobs.max(-1, keepdims=True)
    scaled = below / jnp.where(params.temperature > 0, params.temperature, 1.0)[:, None]
    scaled = lax.cond(
        (params.min_p > 0).any(), lambda s: _apply_min_p(s, params), lambda s: vary_like(s, params), scaled
    )
    truncates = ((params.top_p < 1) | (params.top_k > 0)).any()
    all_kept = vary_like(jnp.ones(scaled.shape, jnp.bool_), scaled, params)
    kept = lax.cond(truncates, lambda s: vary_like(_top_k_top_p(s, params), params), lambda s: all_kept, scaled)
    # argmax(log p + Gumbel noise) is a draw from p.
    noise = jax.vmap(_gumbel, in_axes=(0, 0, None))(params.seed, params.position, logprobs.shape[-1])
    return jnp.argmax(jnp.where(kept, scaled + noise, -jnp.inf), axis=-1).astype(jnp.int32)


def _apply_min_p(scaled: Float[Array, "J V"], params: SamplingArrays) -> Float[Array, "J V"]:
    """Sets tokens with p < min_p * (the largest p) to -inf; before `_top_k_top_p`, as in vLLM."""
    least = scaled.max(-1, keepdims=True) + jnp.log(params.min_p)[:, None]
    return vary_like(jnp.where(scaled >= least, scaled, -jnp.inf), params)


def _gumbel(seed: UInt32[Array, " 2"], position: Int32[Array, ""], vocab: int) -> Float[Array, " V"]:
    key = jax.random.fold_in(jax.random.wrap_key_data(seed, impl="threefry2x32"), position)
    return jax.random.gumbel(key, (vocab,), jnp.float32)


def _top_k_top_p(scaled: Float[Array, "J V"], params: SamplingArrays) -> Bool[Array, "J V"]:
    """Mask of the `top_k` most likely tokens, cut to the fewest whose probability reaches `top_p`."""
    order = jnp.argsort(-scaled, axis=-1, stable=True)
    ranked = jnp.take_along_axis(scaled, order, axis=-1)
    rank = jnp.arange(scaled.shape[-1])
    ranked = jnp.where((params.top_k[:, None] == 0) | (rank < params.top_k[:, None]), ranked, -jnp.inf)
    p = jax.nn.softmax(ranked, axis=-1)
    before = jnp.cumsum(p, axis=-1) - p
    kept = (ranked > -jnp.inf) & ((before < params.top_p[:, None]) | (rank == 0))
    return jnp.put_along_axis(jnp.zeros_like(kept), order, kept, axis=-1, inplace=False)
