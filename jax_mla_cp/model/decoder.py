"""The whole model, per device: embedding, the layers, the head."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Float, Int32

from jax_mla_cp.batch import Batch
from jax_mla_cp.mesh import TP, vary_like
from jax_mla_cp.model.context import Build, Declare, LayerInputs
from jax_mla_cp.model.layers import Mlp, rms_norm, rope_angles
from jax_mla_cp.model.mla import Mla
from jax_mla_cp.model.moe import Moe
from jax_mla_cp.numerics import einsum_float32


class Layer(nnx.Module):
    """One layer, or, with stacked parameters, a run of equal layers under `lax.scan`."""

    def __init__(self, declare: Declare, build: Build, *, experts: bool):
        c = build.config
        self.build = build
        self.attn_norm = declare(c.hidden_size)
        self.mla = Mla(declare, build)
        self.mlp_norm = declare(c.hidden_size)
        self.mlp = Moe(declare, build) if experts else Mlp(declare, c.hidden_size, c.intermediate_size)

    def __call__(
        self, x: jax.Array, pages: jax.Array, layer: jax.Array, inputs: LayerInputs, pages_per_layer: int
    ) -> tuple[Float[Array, "T D"], Float[Array, "pages page_size C"]]:
        eps = self.build.config.rms_norm_eps
        with jax.named_scope("mla"):
            attended, pages = self.mla(rms_norm(x, self.attn_norm[...], eps), pages, layer, inputs, pages_per_layer)
            x = x + attended
        with jax.named_scope("mlp"):
            normed = rms_norm(x, self.mlp_norm[...], eps)
            if isinstance(self.mlp, Moe):
                out = self.mlp(normed, inputs.valid, layer - self.build.config.num_dense_layers)
            else:
                out = self.mlp(normed)
            return x + self.build.axes.psum(out, TP), pages


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
            self.dense = Layer(Declare(build, c.num_dense_layers), build, experts=False)
        if c.num_moe_layers:
            self.moe = Layer(Declare(build, c.num_moe_layers), build, experts=True)

    def __call__(
        self, pages: Float[Array, "pages page_size C"], batch: Batch
    ) -> tuple[Float[Array, "T D"], Float[Array, "pages page_size C"]]:
        """Hidden states after the final norm, and the cache with the step's latents."""
        c = self.build.config
        with jax.named_scope("embed"):
            x = self._embed(batch.tokens) if batch.embeds is None else batch.embeds.astype(self.build.dtype)
        cos, sin = rope_angles(batch.positions, c.qk_rope_head_dim, c.rope)
        inputs = LayerInputs(
            valid=jnp.arange(batch.tokens.shape[0]) < batch.num_tokens[0],
            cos=cos,
            sin=sin,
            slots=batch.slots,
            fresh=batch.fresh,
            key_pages=batch.key_pages,
            num_keys=batch.num_keys,
            expanded=batch.expanded,
            absorbed=batch.absorbed,
            row_pages=batch.page_table[batch.absorbed.request],
            absorbed_tokens=batch.absorbed_tokens,
        )
        x = vary_like(x, batch.tokens)
        first = 0
        for stack, count in (("dense", c.num_dense_layers), ("moe", c.num_moe_layers)):
            if count:
                x, pages = self._run(getattr(self, stack), x, pages, first + jnp.arange(count), inputs)
                first += count
        return rms_norm(x, self.final_norm[...], c.rms_norm_eps), pages

    def logits(self, x: Float[Array, "I D"]) -> Float[Array, "I Vp"]:
        """Logits in float32, gathered over tp; -inf for what only pads the vocabulary."""
        head = self.embed[...].T if self.build.config.tie_word_embeddings else self.head[...]
        local = einsum_float32("id,dv->iv", x, head)
        token = self.build.axes.index(TP) * local.shape[1] + jnp.arange(local.shape[1])
        local = jnp.where(token < self.build.config.vocab_size, local, -jnp.inf)
        return self.build.axes.all_gather(local, TP, dim=1)

    def _embed(self, tokens: Int32[Array, " T"]) -> Float[Array, "T D"]:
        """Each tp rank looks up the tokens of its part of the vocabulary."""
        local = tokens - self.build.axes.index(TP) * self.embed.shape[0]
        found = self.embed[...].at[jnp.where(local < 0, self.embed.shape[0], local)].get(mode="fill", fill_value=0)
        return self.build.axes.psum(found, TP)

    def _run(
        self, stack: Layer, x: jax.Array, pages: jax.Array, numbers: jax.Array, inputs: LayerInputs
    ) -> tuple[jax.Array, jax.Array]:
        """The layers of one stack, the cache carried from one to the next."""
        pages_per_layer = pages.shape[0] // self.build.config.num_layers
        graphdef, *states = nnx.split(stack, lambda path, param: param.get_metadata("whole"), ...)
        whole, sliced = states

        def step(
            carry: tuple[jax.Array, jax.Array], xs: tuple[Any, jax.Array]
        ) -> tuple[tuple[jax.Array, jax.Array], None]:
            params, number = xs
            return nnx.merge(graphdef, whole, params)(*carry, number, inputs, pages_per_layer), None

        (x, pages), _ = lax.scan(step, (x, pages), (sliced, numbers))
        return x, pages
