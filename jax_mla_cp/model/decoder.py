"""The whole model, per device: embedding, the layers, the head."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int32

from jax_mla_cp.attention.numerics import einsum_float32
from jax_mla_cp.batch.arrays import Batch
from jax_mla_cp.mesh import TP, vary_like
from jax_mla_cp.model.context import Build, Declare, LayerInputs
from jax_mla_cp.model.layers import rms_norm, rope_angles
from jax_mla_cp.model.mtp import Mtp
from jax_mla_cp.model.stack import Layer, run


class Decoder(nnx.Module):
    """The decoder of DeepSeek-V2, V3 and Kimi K2. The parameters are declared, not made: see `jax_mla_cp.checkpoint`."""

    def __init__(self, build: Build):
        c = build.config
        self.build = build
        declare = Declare(build)
        self.embed = declare(build.padded_vocab, c.hidden_size, spec=(TP, None))
        self.final_norm = declare(c.hidden_size)
        if not c.tie_word_embeddings:
            self.head = declare(c.hidden_size, build.padded_vocab, spec=(None, TP))
        if c.num_dense_layers:
            self.dense = Layer(build, 0, c.num_dense_layers, experts=False)
        if c.num_moe_layers:
            self.moe = Layer(build, c.num_dense_layers, c.num_moe_layers, experts=True)
        if build.mtp:
            self.mtp = Mtp(build)

    def __call__(
        self, pages: Float[Array, "pages page_size C"], batch: Batch
    ) -> tuple[Float[Array, "T D"], Float[Array, "pages page_size C"]]:
        """Hidden states after the final norm, and the cache with the step's latents."""
        c = self.build.config
        with jax.named_scope("embed"):
            x = self.embed_tokens(batch.tokens) if batch.embeds is None else batch.embeds.astype(self.build.dtype)
        inputs = self.inputs(batch)
        pages_per_layer = pages.shape[0] // self.build.cache_layers
        x = vary_like(x, batch.tokens)
        first = 0
        for stack, count in (("dense", c.num_dense_layers), ("moe", c.num_moe_layers)):
            if count:
                x, pages = run(getattr(self, stack), x, pages, first + jnp.arange(count), inputs, pages_per_layer)
                first += count
        return rms_norm(x, self.final_norm[...], c.rms_norm_eps), pages

    def inputs(self, batch: Batch) -> LayerInputs:
        """What a batch's layers share."""
        cos, sin = rope_angles(batch.positions, self.build.config.qk_rope_head_dim, self.build.config.rope)
        return LayerInputs(
            valid=jnp.arange(batch.tokens.shape[0]) < batch.num_tokens[0],
            cos=cos,
            sin=sin,
            slots=batch.slots,
            pages_to_zero=batch.pages_to_zero,
            key_pages=batch.key_pages,
            num_keys=batch.num_keys,
            expanded=batch.expanded,
            absorbed=batch.absorbed,
            row_pages=batch.page_table[batch.absorbed.request],
            absorbed_tokens=batch.absorbed_tokens,
        )

    def logits(self, x: Float[Array, "I D"]) -> Float[Array, "I Vp"]:
        """Logits in float32, gathered over tp; -inf for what only pads the vocabulary."""
        head = self.embed[...].T if self.build.config.tie_word_embeddings else self.head[...]
        local = einsum_float32("id,dv->iv", x, head)
        token = self.build.axes.index(TP) * local.shape[1] + jnp.arange(local.shape[1])
        local = jnp.where(token < self.build.config.vocab_size, local, -jnp.inf)
        return self.build.axes.all_gather(local, TP, dim=1)

    def embed_tokens(self, tokens: Int32[Array, " T"]) -> Float[Array, "T D"]:
        """Each tp rank looks up the tokens of its part of the vocabulary."""
        local = tokens - self.build.axes.index(TP) * self.embed.shape[0]
        found = self.embed[...].at[jnp.where(local < 0, self.embed.shape[0], local)].get(mode="fill", fill_value=0)
        return self.build.axes.psum(found, TP)
