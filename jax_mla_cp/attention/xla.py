"""Attention in plain JAX, for any device: exact, and blockwise over queries and keys (flash attention,
arXiv:2205.14135), so that its memory grows linearly with the number of tokens.

The work is a list of (row, block of queries) items, built from the rows on the device; both loops over it have dynamic
trip counts, so that empty rows and keys past a row's end cost nothing. (Such a loop has no reverse-mode derivative.)
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int32

from jax_mla_cp.attention.numerics import einsum_float32
from jax_mla_cp.batch.rows import Rows
from jax_mla_cp.cache import read
from jax_mla_cp.mesh import vary_like

_QUERY_BLOCK = 128
_SHORT_QUERY_BLOCK = 4  # for rows of a few tokens (decode), where a block of 128 would be mostly masked
_KEY_BLOCK = 512
_MASKED = -1e30  # finite: a block whose keys are all masked must not make NaN


def attend_expanded(
    q: Float[Array, "T n h+r"], kv: Float[Array, "K n h+r+v"], rows: Rows, *, scale: float
) -> Float[Array, "T n v"]:
    """See `jax_mla_cp.attention.attend_expanded`."""
    keys, dim = kv.shape[0], q.shape[2]
    size = min(_KEY_BLOCK, keys)

    def load(row: jax.Array, start: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        at = jnp.minimum(rows.kv_start[row] + start, keys - size)  # the last block is moved back into the array
        index = at + jnp.arange(size) - rows.kv_start[row]
        block = lax.dynamic_slice_in_dim(kv, at, size)
        return block[..., :dim], block[..., dim:], index

    return _blockwise(q, load, rows, kv.shape[-1] - dim, size, scale, "qnd,knd->nqk", "nqk,knv->qnv")


def attend_absorbed(
    q_latent: Float[Array, "n T R"],
    q_rope: Float[Array, "T n r"],
    pages: Float[Array, "pages page_size R+r"],
    page_table: Int32[Array, "B W"],
    rows: Rows,
    *,
    scale: float,
) -> Float[Array, "n T R"]:
    """See `jax_mla_cp.attention.attend_absorbed`."""
    page_size, rank = pages.shape[1], q_latent.shape[-1]
    width = page_table.shape[1]
    pages_per_block = min(max(1, _KEY_BLOCK // page_size), width)
    page_table = jnp.pad(page_table, ((0, 0), (0, -width % pages_per_block)), constant_values=pages.shape[0])

    def load(row: jax.Array, start: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        ids = lax.dynamic_slice(page_table, (row, start // page_size), (1, pages_per_block))[0]
        latents = read(pages, ids)
        return latents, latents[:, :rank], start + jnp.arange(pages_per_block * page_size)

    q = jnp.concatenate([jnp.swapaxes(q_latent, 0, 1), q_rope], axis=-1)
    out = _blockwise(q, load, rows, rank, pages_per_block * page_size, scale, "qnd,kd->nqk", "nqk,kv->qnv")
    return jnp.swapaxes(out, 0, 1)


Load = Callable[[jax.Array, jax.Array], tuple[jax.Array, jax.Array, jax.Array]]
"""(row, first key) -> (keys, values, each key's index within the row's request)."""


def _blockwise(
    q: jax.Array, load: Load, rows: Rows, v_dim: int, key_block: int, scale: float, score: str, mix: str
) -> jax.Array:
    tokens, heads, _ = q.shape
    row_len = jnp.diff(rows.cu_q)
    short = row_len <= _SHORT_QUERY_BLOCK
    out = vary_like(jnp.zeros((tokens, heads, v_dim), q.dtype), q, load(jnp.int32(0), jnp.int32(0)), rows)
    for query_block, chosen in ((_SHORT_QUERY_BLOCK, short), (_QUERY_BLOCK, ~short)):
        size = min(query_block, tokens)
        blocks = jnp.where(chosen, -(-row_len // size), 0)
        out = _each_query_block(out, q, load, rows, blocks, size, key_block, scale, score, mix)
    return out


def _each_query_block(
    out: jax.Array,
    q: jax.Array,
    load: Load,
    rows: Rows,
    blocks: Int32[Array, " B"],
    size: int,
    key_block: int,
    scale: float,
    score: str,
    mix: str,
) -> jax.Array:
    tokens, heads, _ = q.shape
    done = jnp.cumsum(blocks)

    def query_block(item: jax.Array, out: jax.Array) -> jax.Array:
        row = jnp.searchsorted(done, item, side="right").astype(jnp.int32)
        first = rows.cu_q[row] + (item - (done[row] - blocks[row])) * size
        stop = jnp.minimum(first + size, rows.cu_q[row + 1])
        at = jnp.minimum(first, tokens - size)  # the last block is moved back into the buffer; `in_row` masks the rest
        token = at + jnp.arange(size)
        in_row = (token >= first) & (token < stop)
        unseen = rows.cu_q[row + 1] - rows.kv_len[row]
        visible = token + 1 - unseen  # keys that each query sees
        q_block = lax.dynamic_slice_in_dim(q, at, size)

        def key_step(j: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            max_score, total, acc = carry
            k, v, index = load(row, j * key_block)
            exists = (index >= j * key_block) & (index < rows.kv_len[row])
            s = einsum_float32(score, q_block, k) * scale
            s = jnp.where(exists & (index < visible[:, None]), s, _MASKED)
            new_max = jnp.maximum(max_score, s.max(-1))
            p = jnp.where(s > _MASKED, jnp.exp(s - new_max[..., None]), 0.0)
            # What lies past the row's end may be anything, NaN too, which a probability of 0 would not remove.
            v = jnp.where(exists.reshape(-1, *[1] * (v.ndim - 1)), v, 0)
            rescale = jnp.exp(max_score - new_max)
            acc = acc * rescale.T[..., None] + einsum_float32(mix, p.astype(v.dtype), v)
            return new_max, total * rescale + p.sum(-1), acc

        carry = (
            jnp.full((heads, size), _MASKED, jnp.float32),
            jnp.zeros((heads, size), jnp.float32),
            jnp.zeros((size, heads, out.shape[-1]), jnp.float32),
        )
        carry = jax.tree.map(lambda x: vary_like(x, out), carry)
        _, total, acc = lax.fori_loop(0, -(-(stop - unseen) // key_block), key_step, carry)
        result = (acc / jnp.where(total > 0, total, 1.0).T[..., None]).astype(out.dtype)
        result = jnp.where(in_row[:, None, None], result, lax.dynamic_slice_in_dim(out, at, size))
        return lax.dynamic_update_slice_in_dim(out, result, at, 0)

    return lax.fori_loop(0, done[-1], query_block, out)
