"""Multi-head latent attention (DeepSeek-V2, arXiv:2405.04434, section 2.1) under context parallelism.

A rank computes the queries of its own tokens and heads. Each token's latent is computed once, gathered over cp (the only
CP collective of the layer) and written to the paged cache; queries then attend to the cache. Rows take one of two forms:

- expanded: the latents are read back in sequence order and up-projected to per-head keys and values;
- absorbed: the up-projections are folded into query and output, and the latents themselves are keys and values.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Float, Int32

from jax_mla_cp import cache
from jax_mla_cp.attention import attend_absorbed, attend_expanded
from jax_mla_cp.mesh import CP, TP, vary_like
from jax_mla_cp.model.context import Build, Declare, LayerInputs
from jax_mla_cp.model.layers import rms_norm, rotate

_LORA_NORM_EPS = (
    1e-6  # whatever rms_norm_eps says: transformers' DeepseekV3Attention builds these norms with the default
)
_KEY_TILE = 1024  # latents that are read and up-projected at a time
_EXPANDED_BYTES = 2 << 30  # bound of the up-projected keys and values; more heads than fit are done in groups


class Mla(nnx.Module):
    """One layer's attention, this rank's heads."""

    def __init__(self, declare: Declare, build: Build):
        c = build.config
        self.build = build
        q_dim = c.qk_nope_head_dim + c.qk_rope_head_dim
        if c.q_lora_rank is None:
            self.q = declare(c.hidden_size, c.num_heads, q_dim, spec=(None, TP, None))
        else:
            self.q_a = declare(c.hidden_size, c.q_lora_rank)
            self.q_norm = declare(c.q_lora_rank)
            self.q_b = declare(c.q_lora_rank, c.num_heads, q_dim, spec=(None, TP, None))
        self.kv_a = declare(c.hidden_size, c.latent_dim)
        self.kv_norm = declare(c.kv_lora_rank)
        self.w_uk = declare(c.kv_lora_rank, c.num_heads, c.qk_nope_head_dim, spec=(None, TP, None))
        self.w_uv = declare(c.kv_lora_rank, c.num_heads, c.v_head_dim, spec=(None, TP, None))
        self.o = declare(c.num_heads, c.v_head_dim, c.hidden_size, spec=(TP, None, None))

    def __call__(
        self,
        x: Float[Array, "T D"],
        pages: Float[Array, "pages page_size C"],
        layer: Int32[Array, ""],
        inputs: LayerInputs,
        pages_per_layer: int,
    ) -> tuple[Float[Array, "T D"], Float[Array, "pages page_size C"]]:
        """Returns the attention's output, summed over tp, and the cache with the step's latents written."""
        # The gather first: it needs nothing of the query projections, which hide it.
        with jax.named_scope("latent"):
            latents = self.build.axes.all_gather(self._latents(x, inputs), CP)
        with jax.named_scope("query"):
            q_nope, q_rope = self._queries(x, inputs)
        with jax.named_scope("write"):
            pages = cache.write(pages, latents, inputs.slots, inputs.fresh, layer, pages_per_layer=pages_per_layer)

        out = None
        if inputs.key_pages.size:
            with jax.named_scope("expanded"):
                key_pages = cache.table(inputs.key_pages, layer, pages_per_layer=pages_per_layer)
                out = self._expanded(q_nope, q_rope, pages, key_pages, inputs)
        with jax.named_scope("absorbed"):
            row_pages = cache.table(inputs.row_pages, layer, pages_per_layer=pages_per_layer)
            absorbed = self._absorbed(q_nope, q_rope, pages, row_pages, inputs)
            out = absorbed if out is None else out + absorbed  # each is zero where the other has rows
        with jax.named_scope("output"):
            return self.build.axes.psum(jnp.einsum("tnv,nvd->td", out, self.o[...]), TP), pages

    def _latents(self, x: jax.Array, inputs: LayerInputs) -> Float[Array, "T C"]:
        rank = self.build.config.kv_lora_rank
        latent = x @ self.kv_a[...]
        compressed = rms_norm(latent[:, :rank], self.kv_norm[...], _LORA_NORM_EPS)
        return jnp.concatenate([compressed, rotate(latent[:, rank:], inputs.cos, inputs.sin)], axis=-1)

    def _queries(self, x: jax.Array, inputs: LayerInputs) -> tuple[Float[Array, "T n h"], Float[Array, "T n r"]]:
        if self.build.config.q_lora_rank is None:
            q = jnp.einsum("td,dnk->tnk", x, self.q[...])
        else:
            low = rms_norm(x @ self.q_a[...], self.q_norm[...], _LORA_NORM_EPS)
            q = jnp.einsum("tq,qnk->tnk", low, self.q_b[...])
        nope = self.build.config.qk_nope_head_dim
        return q[..., :nope], rotate(q[..., nope:], inputs.cos, inputs.sin)

    def _absorbed(
        self, q_nope: jax.Array, q_rope: jax.Array, pages: jax.Array, row_pages: jax.Array, inputs: LayerInputs
    ) -> Float[Array, "T n v"]:
        q_latent = jnp.einsum("tnh,Rnh->tnR", q_nope, self.w_uk[...])
        out = attend_absorbed(
            q_latent, q_rope, pages, row_pages, inputs.absorbed,
            scale=self.build.config.softmax_scale, implementation=self.build.attention,
        )  # fmt: skip
        return jnp.einsum("tnR,Rnv->tnv", out, self.w_uv[...])

    def _expanded(
        self, q_nope: jax.Array, q_rope: jax.Array, pages: jax.Array, key_pages: jax.Array, inputs: LayerInputs
    ) -> Float[Array, "T n v"]:
        q = jnp.concatenate([q_nope, q_rope], axis=-1)
        heads = q.shape[1]
        groups = self._head_groups(key_pages.size * pages.shape[1], heads, pages.dtype.itemsize)

        def split(x: jax.Array) -> jax.Array:  # [.., n, ..] -> [groups, .., n / groups, ..]
            return jnp.moveaxis(x.reshape(x.shape[0], groups, heads // groups, x.shape[2]), 1, 0)

        def attend(group: tuple[jax.Array, ...]) -> jax.Array:
            q, w_uk, w_uv = group
            k, v = self._up_project(pages, key_pages, inputs.num_keys[0], w_uk, w_uv)
            return attend_expanded(
                q, k, v, inputs.expanded,
                scale=self.build.config.softmax_scale, implementation=self.build.attention,
            )  # fmt: skip

        if groups == 1:
            return attend((q, self.w_uk[...], self.w_uv[...]))
        out = lax.map(attend, (split(q), split(self.w_uk[...]), split(self.w_uv[...])))
        return jnp.moveaxis(out, 0, 1).reshape(*q.shape[:2], -1)

    def _head_groups(self, keys: int, heads: int, itemsize: int) -> int:
        """The fewest groups of heads whose keys and values stay under the bound."""
        c = self.build.config
        per_head = keys * (c.qk_nope_head_dim + c.qk_rope_head_dim + c.v_head_dim) * itemsize
        fits = [g for g in range(1, heads + 1) if heads % g == 0 and per_head * (heads // g) <= _EXPANDED_BYTES]
        return fits[0] if fits else heads

    def _up_project(
        self, pages: jax.Array, key_pages: jax.Array, num_keys: jax.Array, w_uk: jax.Array, w_uv: jax.Array
    ) -> tuple[Float[Array, "K n h+r"], Float[Array, "K n v"]]:
        """Keys and values of the packed latents, tile by tile, as many as there are this time."""
        rank = self.build.config.kv_lora_rank
        page_size, total = pages.shape[1], key_pages.size
        tile = min(max(1, _KEY_TILE // page_size), total)
        heads, keys = w_uk.shape[1], total * page_size

        def step(i: jax.Array, kv: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            first = jnp.minimum(i * tile, total - tile)  # the last tile is moved back; it repeats what it overlaps
            latents = cache.read(pages, lax.dynamic_slice_in_dim(key_pages, first, tile))
            nope = jnp.einsum("kR,Rnh->knh", latents[:, :rank], w_uk)
            roped = jnp.broadcast_to(latents[:, None, rank:], (*nope.shape[:2], latents.shape[1] - rank))
            k = jnp.concatenate([nope, roped], axis=-1)
            v = jnp.einsum("kR,Rnv->knv", latents[:, :rank], w_uv)
            at = first * page_size
            old_k, old_v = kv
            return (
                lax.dynamic_update_slice_in_dim(old_k, k, at, 0),
                lax.dynamic_update_slice_in_dim(old_v, v, at, 0),
            )

        def empty(width: int) -> jax.Array:
            return vary_like(jnp.zeros((keys, heads, width), pages.dtype), pages, w_uk, key_pages)

        rope = pages.shape[2] - rank
        kv = empty(w_uk.shape[2] + rope), empty(w_uv.shape[2])
        return lax.fori_loop(0, -(-num_keys // (tile * page_size)), step, kv)
