"""The step: one `shard_map` around the model, and the sampler behind it.

`forward` is what a notebook jits; `forward_and_sample` is what the server runs. Both are plain functions of (model, pages, batch).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from jax_mla_cp.batch.arrays import Batch
from jax_mla_cp.batch.packing import Packed, pack, packed_specs, unpack
from jax_mla_cp.cache import PAGES_SPEC
from jax_mla_cp.mesh import CP, TOKENS, mesh_shape, on_devices
from jax_mla_cp.model.decoder import Decoder
from jax_mla_cp.model.loaded_model import Model, param_specs
from jax_mla_cp.step.logit_bias import LogitBiasArrays
from jax_mla_cp.step.sampling import SamplerOutput, TokenLogprobsArrays, likely, sample
from jax_mla_cp.step.speculation import propose

_SCORED_AT_ONCE = 256
"""Tokens whose logits `score` has in memory at a time: of 129K words, 132 MB."""


def forward(
    model: Model, pages: Float[Array, "pages page_size C"], batch: Batch | Packed
) -> tuple[Float[Array, "J Vp"], jax.Array]:
    """Runs a batch: logits after each request's last token, and the cache with the step's latents.

    With `draft_tokens` d, a request has 1 + d rows: after its last token before the drafts, and after each of them.

    Jit it with the cache donated, `jax.jit(forward, donate_argnums=1)`, or every call copies the cache.

    Returns:
      float32 logits, one row per place of the batch in its own order (see `Planner.batch`), padded vocabulary at -inf,
      sharded P(("dp", "cp")); and the cache, sharded as before.
    """

    def run(decoder: Decoder, pages: jax.Array, batch: Batch) -> tuple[jax.Array, jax.Array]:
        hidden, pages = decoder(pages, batch)
        return _last_logits(decoder, hidden, batch), pages

    return _run(run, (PartitionSpec(TOKENS), PAGES_SPEC), model, pages, batch)


def forward_and_sample(
    model: Model,
    pages: jax.Array,
    batch: Batch | Packed,
    bias: LogitBiasArrays | None = None,
    *,
    scored: bool = False,
) -> tuple[SamplerOutput, jax.Array]:
    """`forward`, and a token sampled for each row of it; with speculation also the next drafts of each request.

    Args:
      bias: changes to the logits that tokens are sampled by.
      scored: also tell the log-probability of each token's next one.
    """

    def run(
        decoder: Decoder, pages: jax.Array, batch: Batch, *bias: LogitBiasArrays
    ) -> tuple[SamplerOutput, jax.Array]:
        hidden, pages = decoder(pages, batch)
        logits = _last_logits(decoder, hidden, batch)
        with jax.named_scope("sample"):
            sampled = sample(logits[:, : model.config.vocab_size], batch.sampling, *bias)
        if batch.speculation is not None:
            with jax.named_scope("propose"):
                drafts, pages = propose(decoder, hidden, pages, batch, sampled.token)
                sampled = dataclasses.replace(sampled, drafts=drafts)
        if scored:
            sampled = dataclasses.replace(sampled, scored=TokenLogprobsArrays(*_score(decoder, hidden, batch, likely)))
        return sampled, pages

    return _run(run, (PartitionSpec(TOKENS), PAGES_SPEC), model, pages, batch, *([] if bias is None else [bias]))


def score(model: Model, pages: jax.Array, batch: Batch | Packed) -> tuple[Float[Array, " T"], jax.Array]:
    """Runs a batch: the log-probability of each token's next one, and the cache with the step's latents.

    Returns:
      float32, in the places of `batch.next_tokens`; it means nothing where that is -1 or there is no token.
    """

    def run(decoder: Decoder, pages: jax.Array, batch: Batch) -> tuple[jax.Array, jax.Array]:
        hidden, pages = decoder(pages, batch)

        def one(logprobs: jax.Array, token: jax.Array) -> jax.Array:
            return jnp.take_along_axis(logprobs, token[:, None], axis=-1)[:, 0]

        scores: jax.Array = _score(decoder, hidden, batch, one)
        return scores, pages

    return _run(run, (PartitionSpec(TOKENS), PAGES_SPEC), model, pages, batch)


def _score(decoder: Decoder, hidden: jax.Array, batch: Batch, what: Callable[[jax.Array, jax.Array], Any]) -> Any:
    """Per device, `what` of (log-probabilities after a token, the token's next one), for each token of the buffer, block by
    block."""
    tokens = hidden.shape[0]
    size = min(_SCORED_AT_ONCE, tokens)

    def block(inputs: tuple[jax.Array, jax.Array]) -> Any:
        hidden, token = inputs
        logits = decoder.logits(hidden)[:, : decoder.build.config.vocab_size]
        return what(jax.nn.log_softmax(logits), token)

    with jax.named_scope("score"):
        hidden = jnp.pad(hidden, ((0, -tokens % size), (0, 0))).reshape(-1, size, hidden.shape[1])
        following = jnp.pad(batch.next_tokens, (0, -tokens % size)).reshape(-1, size)
        return jax.tree.map(lambda x: lax.collapse(x, 0, 2)[:tokens], lax.map(block, (hidden, following)))


def _last_logits(decoder: Decoder, hidden: jax.Array, batch: Batch) -> jax.Array:
    """Per device. Each cp rank brings the last tokens that it has; each gets the sum for its share of the requests."""
    with jax.named_scope("head"):
        last = hidden.at[batch.last_index].get(mode="fill", fill_value=0)
        return decoder.logits(decoder.build.axes.psum_scatter(last, CP))


def _run(
    per_device: Callable[..., Any],
    out_specs: Any,
    model: Model,
    pages: jax.Array,
    batch: Batch | Packed,
    *per_token: Any,
) -> Any:
    """`per_device` of (decoder, pages, batch, and what else is divided like the tokens)."""

    def run(params: Any, pages: jax.Array, batch: Batch | Packed, *per_token: Any) -> Any:
        return per_device(model.decoder(params), pages, unpack(batch), *per_token)

    if model.mesh is None:
        return run(model.params, pages, batch, *per_token)
    in_specs = (param_specs(model.params), PAGES_SPEC, packed_specs(batch), *(PartitionSpec(TOKENS) for _ in per_token))
    mapped = jax.shard_map(run, mesh=model.mesh, in_specs=in_specs, out_specs=out_specs)
    return mapped(model.params, pages, batch, *per_token)


def put(model: Model, batch: Batch) -> Packed:
    """A host batch onto the model's devices that are this process's. Every process must pass the same one."""
    packed = pack(batch, mesh_shape(model.mesh))
    return on_devices(packed, packed_specs(packed), model.mesh)
