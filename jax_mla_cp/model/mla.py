"""Multi-head latent attention (DeepSeek-V2, arXiv:2405.04434, section 2.1) under context parallelism.

A rank computes the queries of its own tokens and heads. Each token's latent is computed once, gathered over cp (the only
CP collective of the layer) and written to the paged cache; queries then attend to the cache. Rows take one of two forms:

- expanded: the latents are read back in sequence order and up-projected to per-head keys and values;
- absorbed: the up-projections are folded into query and output, and the latents themselves are keys and values.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Float, Int32

from jax_mla_cp import cache
from jax_mla_cp.attention import attend_absorbed, attend_expanded
from jax_mla_cp.mesh import CP, TP
from jax_mla_cp.model.build import Build
from jax_mla_cp.model.fp8 import Fp8
from jax_mla_cp.model.grouped_matmul import GroupedMatmul, grouped_matmul
from jax_mla_cp.model.layer_inputs import LayerInputs
from jax_mla_cp.model.layers import rotate
from jax_mla_cp.model.linear import linear
from jax_mla_cp.model.norm import rms_norm
from jax_mla_cp.model.params import ParamFactory

# Independent of rms_norm_eps: transformers' DeepseekV3Attention builds these norms with the default.
_LORA_NORM_EPS = 1e-6
_EXPANDED_BYTES = 2 << 30  # bounds the up-projected keys and values; more heads than fit are done in groups


class Mla(nnx.Module):
    """A layer's attention, this rank's heads. Returns this rank's part of the sum over tp."""

    def __init__(self, param: ParamFactory, build: Build):
        c = build.config
        self.build = build
        nope, q_dim = c.qk_nope_head_dim, c.qk_nope_head_dim + c.qk_rope_head_dim
        heads = range(0, c.num_heads * q_dim, q_dim)
        roped = [range(first + nope, first + q_dim) for first in heads] if c.rope.interleaved else []
        if c.q_lora_rank is None:
            self.q = param.matrix(c.num_heads * q_dim, c.hidden_size, spec=(TP, None), reordered=roped)
        else:
            self.q_a = param.matrix(c.q_lora_rank, c.hidden_size)
            self.q_norm = param(c.q_lora_rank)
            self.q_b = param.matrix(c.num_heads * q_dim, c.q_lora_rank, spec=(TP, None), reordered=roped)
        roped = [range(c.kv_lora_rank, c.latent_dim)] if c.rope.interleaved else []
        self.kv_a = param.matrix(c.latent_dim, c.hidden_size, reordered=roped)
        self.kv_norm = param(c.kv_lora_rank)
        self.w_uk = param.per_head(c.num_heads, nope, c.kv_lora_rank, spec=(TP, None, None))
        self.w_uv = param.per_head(c.num_heads, c.v_head_dim, c.kv_lora_rank, spec=(TP, None, None))
        self.o = param.matrix(c.hidden_size, c.num_heads * c.v_head_dim, spec=(None, TP))

    def __call__(
        self,
        x: Float[Array, "T D"],
        pages: Float[Array, "pages page_size C"],
        number: Int32[Array, ""],
        index: Int32[Array, ""],
        inputs: LayerInputs,
    ) -> tuple[Float[Array, "T D"], Float[Array, "pages page_size C"]]:
        """Returns this rank's part of the attention's output, and the cache with the step's latents written.

        Args:
          x: normed hidden states.
          number: the layer's number in the cache.
          index: the layer's place in its stack (see `linear`).
        """
        layers = self.build.cache_layers
        # The gather first: it needs nothing of the query projections, which hide it.
        with jax.named_scope("latent"):
            latents = self.build.axes.all_gather(self._latents(x, index, inputs), CP)
        with jax.named_scope("query"):
            q_nope, q_rope = self._queries(x, index, inputs)
        with jax.named_scope("write"):
            pages = cache.write(pages, latents, inputs.slot_mapping, inputs.pages_to_zero, number, layers=layers)

        out, absorbed_tokens = None, inputs.absorbed_tokens
        if inputs.key_pages.size:
            with jax.named_scope("expanded"):
                key_pages = cache.layer_pages(pages, inputs.key_pages, number, layers=layers)
                out = self._expanded(q_nope, q_rope, pages, key_pages, inputs)
        if absorbed_tokens:
            with jax.named_scope("absorbed"):
                row_page_table = cache.layer_pages(pages, inputs.row_page_table, number, layers=layers)
                absorbed = self._absorbed(
                    q_nope[:absorbed_tokens], q_rope[:absorbed_tokens], pages, row_page_table, inputs
                )
                # Each form's output is zero for the other's tokens.
                out = absorbed if out is None else _add_to_first(out, absorbed)
        with jax.named_scope("output"):
            assert out is not None, "a step has rows of a form"
            return self._linear(out.reshape(len(out), -1), self.o, index), pages

    def _linear(self, x: jax.Array, weight: nnx.Param[Any] | Fp8, index: jax.Array) -> Float[Array, "T N"]:
        return linear(x, weight, index, self.build)

    def _latents(self, x: jax.Array, index: jax.Array, inputs: LayerInputs) -> Float[Array, "T C"]:
        rank = self.build.config.kv_lora_rank
        latent = self._linear(x, self.kv_a, index)
        compressed = rms_norm(latent[:, :rank], self.kv_norm[...], _LORA_NORM_EPS)
        return jnp.concatenate([compressed, rotate(latent[:, rank:], inputs.cos, inputs.sin)], axis=-1)

    def _queries(
        self, x: jax.Array, index: jax.Array, inputs: LayerInputs
    ) -> tuple[Float[Array, "T n h"], Float[Array, "T n r"]]:
        nope = self.build.config.qk_nope_head_dim
        if self.build.config.q_lora_rank is None:
            q = self._linear(x, self.q, index)
        else:
            low = rms_norm(self._linear(x, self.q_a, index), self.q_norm[...], _LORA_NORM_EPS)
            q = self._linear(low, self.q_b, index)
        q = q.reshape(len(x), -1, nope + self.build.config.qk_rope_head_dim)
        return q[..., :nope], rotate(q[..., nope:], inputs.cos, inputs.sin)

    def _absorbed(
        self, q_nope: jax.Array, q_rope: jax.Array, pages: jax.Array, row_page_table: jax.Array, inputs: LayerInputs
    ) -> Float[Array, "T n v"]:
        out = attend_absorbed(
            jnp.einsum("tnh,nhR->ntR", q_nope, self.w_uk[...]),
            q_rope,
            pages,
            row_page_table,
            inputs.absorbed,
            scale=self.build.config.softmax_scale,
            implementation=self.build.attention,
        )
        return jnp.einsum("ntR,nvR->tnv", out, self.w_uv[...])

    def _expanded(
        self, q_nope: jax.Array, q_rope: jax.Array, pages: jax.Array, key_pages: jax.Array, inputs: LayerInputs
    ) -> Float[Array, "T n v"]:
        q = jnp.concatenate([q_nope, q_rope], axis=-1)
        heads = q.shape[1]
        groups = self._head_groups(key_pages.size * pages.shape[1], heads, pages.dtype.itemsize)

        def split(x: jax.Array) -> jax.Array:  # [n, ..] -> [groups, n / groups, ..]
            return x.reshape(groups, heads // groups, *x.shape[1:])

        latents = cache.read(pages, key_pages)

        def attend(group: tuple[jax.Array, ...]) -> jax.Array:
            q, w_uk, w_uv = group
            with jax.named_scope("up_project"):
                kv = up_project(latents, inputs.num_keys, w_uk, w_uv, self.build.grouped_matmul)
            with jax.named_scope("attention"):
                return attend_expanded(
                    q,
                    kv,
                    inputs.expanded,
                    scale=self.build.config.softmax_scale,
                    implementation=self.build.attention,
                )

        if groups == 1:
            return attend((q, self.w_uk[...], self.w_uv[...]))
        split_q = jnp.moveaxis(q.reshape(len(q), groups, heads // groups, -1), 1, 0)
        out = lax.map(attend, (split_q, split(self.w_uk[...]), split(self.w_uv[...])))
        return jnp.moveaxis(out, 0, 1).reshape(*q.shape[:2], -1)

    def _head_groups(self, keys: int, heads: int, itemsize: int) -> int:
        """The fewest groups of heads whose keys and values stay under the bound."""
        c = self.build.config
        per_head = keys * (c.qk_nope_head_dim + c.qk_rope_head_dim + c.v_head_dim) * itemsize
        fits = [g for g in range(1, heads + 1) if heads % g == 0 and per_head * (heads // g) <= _EXPANDED_BYTES]
        return fits[0] if fits else heads


def _add_to_first(x: Float[Array, "T n v"], first: Float[Array, "A n v"]) -> Float[Array, "T n v"]:
    # XLA:CPU's compiler (jaxlib 0.11.2) crashes on an update of all rows.
    return x + first if len(first) == len(x) else x.at[: len(first)].add(first)


def up_project(
    latents: Float[Array, "K R+r"],
    num_keys: Int32[Array, " 1"],
    w_uk: Float[Array, "n h R"],
    w_uv: Float[Array, "n v R"],
    implementation: GroupedMatmul,
) -> Float[Array, "K n h+r+v"]:
    """Up-projects the first `num_keys` latents to keys and values, a head's value beside its key; the rest is undefined.

    One product makes whole keys: the roped part, which all heads share, passes through an identity block, unchanged.
    That costs 1.4 times the multiplications, and saves writing the keys, reading them and writing them again to put
    the roped part beside them. It is a grouped product of one group, because that one stops at `num_keys`.
    """
    heads, _, rank = w_uk.shape
    rope = latents.shape[1] - rank
    roped = jnp.broadcast_to(jnp.eye(rope, latents.shape[1], rank, dtype=w_uk.dtype), (heads, rope, rank + rope))
    key, value = (jnp.pad(w, ((0, 0), (0, 0), (0, rope))) for w in (w_uk, w_uv))
    weight = jnp.concatenate([key, roped, value], axis=1)
    kv = grouped_matmul(latents, weight.reshape(1, -1, rank + rope), num_keys, implementation=implementation)
    return kv.reshape(len(latents), heads, -1)
