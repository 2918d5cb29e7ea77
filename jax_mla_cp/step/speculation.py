"""Speculative decoding: acceptance of drafts, and the MTP layer's next ones. Per device, after the model and the sampler.

A step's new tokens of a decoding request are the last sampled one and `n <= d` drafts. The model runs over all of them, and
the sampler draws a token after each, from the model's distribution there and with the key of (seed, position) that it would
have used anyway. A draft is accepted while it equals the token drawn in its place. The first drawn token that differs replaces
its draft; if all are accepted, the last drawn token is a bonus: 1 to n + 1 tokens a step.

No probabilities are compared: a draft is an argmax, so its proposal distribution is a point. Rejection sampling
(arXiv:2211.17192, section 2.3) accepts a draft x with probability min(1, p(x) / 1) = p(x), and otherwise draws from p without
x. Drawing y from p and accepting if y = x does the same: y = x happens with probability p(x), and y given y != x is
distributed as p without x. It is independent of how x came about, because x follows from tokens before it, whose random
numbers are others. So the output has the model's distribution; and since y is the token that would have been drawn without
drafts, it is even the same output, up to ties that floating point breaks in another way.

The MTP layer runs over the whole step's buffer, prompts and drafts alike, with the rows of the model's layers: its latents
must be in the cache before it can draft. It needs the token after each: the batch brings those that are known, and the others
have just been drawn. Latents behind a rejected draft belong to tokens that do not exist; no row's `kv_len` reaches them before
later steps have written over them.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int32

from jax_mla_cp import cache
from jax_mla_cp.batch.arrays import Batch, SpeculationArrays
from jax_mla_cp.batch.rows import Rows
from jax_mla_cp.mesh import CP
from jax_mla_cp.model.decoder import Decoder
from jax_mla_cp.model.layer_inputs import LayerInputs
from jax_mla_cp.model.layers import rope_angles


def propose(
    decoder: Decoder,
    hidden: Float[Array, "T D"],
    pages: Float[Array, "pages page_size C"],
    batch: Batch,
    sampled: Int32[Array, " J/cp"],
) -> tuple[Int32[Array, "I/cp d"], Float[Array, "pages page_size C"]]:
    """Drafts for this rank's share of the requests, and the cache with the MTP layer's latents.

    Args:
      hidden: the model's states after the final norm.
      sampled: the tokens drawn in this step, of this rank's share of the requests.
    """
    axes, spec = decoder.build.axes, batch.speculation
    assert spec is not None
    num_drafts = spec.drafts.shape[1]
    drawn = axes.all_gather(sampled.reshape(-1, 1 + num_drafts), CP)
    num_accepted = count_accepted(drawn, spec.drafts)
    state, pages = decoder.mtp(
        decoder.embed_tokens(_next_tokens(batch, drawn)), hidden, pages, decoder.inputs(pages, batch)
    )
    last = jnp.take_along_axis(batch.last_index.reshape(-1, 1 + num_drafts), num_accepted[:, None], axis=1)[:, 0]
    state = axes.psum_scatter(state.at[last].get(mode="fill", fill_value=0), CP)
    draft = _greedy(decoder, state)
    if num_drafts == 1:
        return draft[:, None], pages

    def recycle(
        carry: tuple[jax.Array, jax.Array, jax.Array], ahead: jax.Array
    ) -> tuple[tuple[jax.Array, jax.Array, jax.Array], jax.Array]:
        state, draft, pages = carry
        inputs = _inputs(decoder, batch, spec, spec.first_position + num_accepted + ahead, pages)
        state, pages = decoder.mtp(decoder.embed_tokens(draft), state, pages, inputs)
        draft = _greedy(decoder, state)
        return (state, draft, pages), draft

    (_, _, pages), more = lax.scan(recycle, (state, draft, pages), jnp.arange(1, num_drafts))
    return jnp.concatenate([draft[None], more]).T, pages


def count_accepted(drawn: Int32[Array, "I 1+d"], drafts: Int32[Array, "I d"]) -> Int32[Array, " I"]:
    """Number of accepted drafts of each request: those before the first that differs from the token drawn in its place."""
    return jnp.cumprod(drawn[:, :-1] == drafts, axis=1, dtype=jnp.int32).sum(1)


def _next_tokens(batch: Batch, drawn: Int32[Array, "I 1+d"]) -> Int32[Array, " T"]:
    """The token after each of this rank's; undefined behind the first rejected draft."""
    filled = batch.next_tokens.at[batch.last_index].set(drawn.reshape(-1), mode="drop")
    return jnp.where(batch.next_tokens < 0, filled, batch.next_tokens)


def _greedy(decoder: Decoder, state: Float[Array, "I/cp D"]) -> Int32[Array, " I/cp"]:
    with jax.named_scope("head"):
        return jnp.argmax(decoder.logits(state), axis=-1).astype(jnp.int32)


def _inputs(
    decoder: Decoder,
    batch: Batch,
    spec: SpeculationArrays,
    position: Int32[Array, " I"],
    pages: Float[Array, "pages page_size C"],
) -> LayerInputs:
    """One token of each request, at `position`: each rank computes its share, all write all latents.

    Latents at or past `spec.writable_end` are dropped; the request has no use for drafts from there. Pages that begin
    before it have been zeroed by the pass over the step's tokens (here, XLA could do so before that pass's attention has read
    the cache, and would copy it).
    """
    c, axes = decoder.build.config, decoder.build.axes
    share, writable_end = len(position) // axes.size(CP), spec.writable_end
    assert batch.page_table is not None, "a step that keeps the table fills it in"

    def share_of(values: jax.Array) -> jax.Array:
        return lax.dynamic_slice_in_dim(values, axes.index(CP) * share, share)

    slots = cache.slots_at(
        pages, batch.page_table, spec.table_row, position, position < writable_end, layers=decoder.build.cache_layers
    )
    exists = share_of(writable_end) > 0  # requests stand before places without one
    cos, sin = rope_angles(share_of(position), c.qk_rope_head_dim, c.rope)
    rows = Rows(
        cu_q=jnp.minimum(jnp.arange(share + 1), exists.sum()),
        kv_len=jnp.where(exists, share_of(jnp.minimum(position + 1, writable_end)), 0),
        kv_start=jnp.zeros(share, jnp.int32),
        request=share_of(spec.table_row),
    )
    return dataclasses.replace(
        decoder.inputs(pages, batch),
        valid=exists,
        cos=cos,
        sin=sin,
        slot_mapping=slots,
        pages_to_zero=batch.pages_to_zero[:0],
        key_pages=batch.key_pages[:0],
        absorbed=rows,
        row_page_table=cache.row_pages(pages, batch.page_table, rows),
        absorbed_tokens=share,
    )
