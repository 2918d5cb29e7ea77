"""`Decoder`, the whole model, per device: embedding, layers, head."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int32

from jax_mla_cp import cache
from jax_mla_cp.attention import schedule
from jax_mla_cp.attention.numerics import einsum_float32
from jax_mla_cp.batch.arrays import Batch
from jax_mla_cp.mesh import TP, vary_like
from jax_mla_cp.model.build import Build
from jax_mla_cp.model.layer_inputs import LayerInputs
from jax_mla_cp.model.layers import rope_angles
from jax_mla_cp.model.mtp import Mtp
from jax_mla_cp.model.norm import rms_norm
from jax_mla_cp.model.params import ParamFactory
from jax_mla_cp.model.stack import LayerStack, Residual


class Decoder(nnx.Module):
    """The decoder of DeepSeek-V2, V3 and Kimi K2.

    Its parameters are only declared (see `ParamFactory`). Their paths are the names of a converted checkpoint's arrays.
    """

    def __init__(self, build: Build):
        c = build.config
        self.build = build
        param = ParamFactory(build)
        self.embed = param(build.padded_vocab, c.hidden_size, spec=(TP, None))
        self.final_norm = param(c.hidden_size)
        if not c.tie_word_embeddings:
            self.head = param(c.hidden_size, build.padded_vocab, spec=(None, TP))
        if c.num_dense_layers:
            self.dense = LayerStack(build, 0, c.num_dense_layers, experts=False)
        if c.num_moe_layers:
            self.moe = LayerStack(build, c.num_dense_layers, c.num_moe_layers, experts=True)
        if build.mtp:
            self.mtp = Mtp(build)

    def __call__(
        self, pages: Float[Array, "pages page_size C"], batch: Batch
    ) -> tuple[Float[Array, "T D"], Float[Array, "pages page_size C"]]:
        """Hidden states after the final norm, and the cache with the step's latents."""
        c = self.build.config
        with jax.named_scope("embed"):
            x = self.embed_tokens(batch.tokens) if batch.embeds is None else batch.embeds.astype(self.build.dtype)
        inputs = self.inputs(pages, batch)
        residual = Residual.begin(vary_like(x, batch.tokens))
        if c.num_dense_layers:
            residual, pages = self.dense(residual, pages, inputs)
        if c.num_moe_layers:
            residual, pages = self.moe(residual, pages, inputs)
        return rms_norm(residual.x + residual.part, self.final_norm[...], c.rms_norm_eps), pages

    def inputs(self, pages: Float[Array, "pages page_size C"], batch: Batch) -> LayerInputs:
        """The inputs that all layers share."""
        assert batch.page_table is not None, "a step that keeps the table fills it in"
        cos, sin = rope_angles(batch.positions, self.build.config.qk_rope_head_dim, self.build.config.rope)
        heads = self.build.config.num_heads // self.build.axes.size(TP)
        return LayerInputs(
            valid=jnp.arange(batch.tokens.shape[0]) < batch.num_tokens[0],
            cos=cos,
            sin=sin,
            slot_mapping=batch.slot_mapping,
            pages_to_zero=batch.pages_to_zero,
            key_pages=batch.key_pages,
            num_keys=batch.num_keys,
            expanded=batch.expanded,
            absorbed=schedule(batch.absorbed, batch.absorbed_tokens, heads, self.build.attention),
            row_page_table=cache.row_pages(pages, batch.page_table, batch.absorbed),
            absorbed_tokens=batch.absorbed_tokens,
        )

    def logits(self, x: Float[Array, "I D"]) -> Float[Array, "I Vp"]:
        """Logits in float32, gathered over tp; -inf for the padding of the vocabulary."""
        head = self.embed[...].T if self.build.config.tie_word_embeddings else self.head[...]
        local = einsum_float32("id,dv->iv", x, head)
        token = self.build.axes.index(TP) * local.shape[1] + jnp.arange(local.shape[1])
        local = jnp.where(token < self.build.config.vocab_size, local, -jnp.inf)
        return self.build.axes.all_gather(local, TP, dim=1)

    def embed_tokens(self, tokens: Int32[Array, " T"]) -> Float[Array, "T D"]:
        """The tokens' embeddings: each tp rank looks up those of its part of the vocabulary, and they are summed."""
        local = tokens - self.build.axes.index(TP) * self.embed.shape[0]
        found = self.embed[...].at[jnp.where(local < 0, self.embed.shape[0], local)].get(mode="fill", fill_value=0)
        return self.build.axes.psum(found, TP)
