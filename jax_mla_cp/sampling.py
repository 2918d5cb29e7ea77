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

from jax_mla_cp.batch import SamplingArrays
from jax_mla_cp.mesh import vary_like

TOP_LOGPROBS = 20


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SampledArrays:
    """Per place for a sampled token (`J` of them, one per request without speculation): the token, its log-probability, and
    the most likely tokens with theirs.

    Log-probabilities are those of the model, before temperature and truncation, in float32.
    """

    token: Any  # int32 [J]
    logprob: Any  # float32 [J]
    top_tokens: Any  # int32 [J, min(20, V)]
    top_logprobs: Any  # float32 [J, min(20, V)]
    drafts: Any = None  # int32 [I, d]: guesses at each request's following tokens; None without speculation


def sample(logits: Float[Array, "J V"], how: SamplingArrays) -> SampledArrays:
    """One token per place. Temperature 0 takes the most likely token, the first of equal ones."""
    logprobs = jax.nn.log_softmax(logits.astype(jnp.float32))
    greedy = jnp.argmax(logprobs, axis=-1).astype(jnp.int32)
    random = lax.cond((how.temperature > 0).any(), _draw, lambda *_: greedy, logprobs, how)
    token = jnp.where(how.temperature > 0, random, greedy)
    top_logprobs, top_tokens = lax.top_k(logprobs, min(TOP_LOGPROBS, logits.shape[-1]))
    return SampledArrays(
        token=token,
        logprob=jnp.take_along_axis(logprobs, token[:, None], axis=-1)[:, 0],
        top_tokens=top_tokens,
        top_logprobs=top_logprobs,
    )


def _draw(logprobs: jax.Array, how: SamplingArrays) -> Int32[Array, " J"]:
    scaled = logprobs / jnp.where(how.temperature > 0, how.temperature, 1.0)[:, None]
    truncated = ((how.top_p < 1) | (how.top_k > 0)).any()
    everything = vary_like(jnp.ones(scaled.shape, jnp.bool_), scaled, how)
    kept = lax.cond(truncated, lambda s: vary_like(_nucleus(s, how), how), lambda s: everything, scaled)
    # argmax(log p + Gumbel noise) is a draw from p.
    noise = jax.vmap(_gumbel, in_axes=(0, 0, None))(how.seed, how.position, logprobs.shape[-1])
    return jnp.argmax(jnp.where(kept, scaled + noise, -jnp.inf), axis=-1).astype(jnp.int32)


def _gumbel(seed: UInt32[Array, " 2"], position: Int32[Array, ""], vocab: int) -> Float[Array, " V"]:
    key = jax.random.fold_in(jax.random.wrap_key_data(seed, impl="threefry2x32"), position)
    return jax.random.gumbel(key, (vocab,), jnp.float32)


def _nucleus(scaled: Float[Array, "J V"], how: SamplingArrays) -> Bool[Array, "J V"]:
    """The `top_k` most likely tokens, and of those the fewest whose probability reaches `top_p`."""
    order = jnp.argsort(-scaled, axis=-1, stable=True)
    ranked = jnp.take_along_axis(scaled, order, axis=-1)
    rank = jnp.arange(scaled.shape[-1])
    ranked = jnp.where((how.top_k[:, None] == 0) | (rank < how.top_k[:, None]), ranked, -jnp.inf)
    p = jax.nn.softmax(ranked, axis=-1)
    before = jnp.cumsum(p, axis=-1) - p
    kept = (ranked > -jnp.inf) & ((before < how.top_p[:, None]) | (rank == 0))
    return jnp.put_along_axis(jnp.zeros_like(kept), order, kept, axis=-1, inplace=False)
