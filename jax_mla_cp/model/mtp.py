"""Multi-token prediction: the layer behind the last one, which guesses one token further than the model says.

DeepSeek-V3, arXiv:2412.19437, section 2.2; as its weights are run by SGLang's deepseek_nextn.py: the hidden state is the one
after the final norm, embedding and head are the model's own, and a state that is used again is the one after this layer's
norm. (vLLM's deepseek_mtp.py zeroes the embedding at position 0; here, as in SGLang, no position is different.)
"""

from __future__ import annotations

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from jax_mla_cp.model.context import Build, Declare, LayerInputs
from jax_mla_cp.model.layers import rms_norm
from jax_mla_cp.model.stack import Layer, run


class Mtp(nnx.Module):
    """Two norms and a projection, a layer with experts, a norm. Its latents are one more layer of the cache."""

    def __init__(self, build: Build):
        c = build.config
        declare = Declare(build)
        self.build = build
        self.embed_norm = declare(c.hidden_size)
        self.hidden_norm = declare(c.hidden_size)
        self.project = declare(2 * c.hidden_size, c.hidden_size)
        self.layer = Layer(build, c.num_layers, 1, experts=c.n_routed_experts > 0)
        self.final_norm = declare(c.hidden_size)

    def __call__(
        self,
        embedded: Float[Array, "T D"],
        hidden: Float[Array, "T D"],
        pages: Float[Array, "pages page_size C"],
        inputs: LayerInputs,
    ) -> tuple[Float[Array, "T D"], Float[Array, "pages page_size C"]]:
        """States from which the head tells, for a token at position p, the token at p + 2; and the cache.

        Args:
          embedded: the embeddings of the *next* tokens, those at p + 1.
          hidden: the states at p: the model's after its final norm, or earlier ones of this layer.
          inputs: those of positions p.
        """
        c = self.build.config
        both = [
            rms_norm(embedded, self.embed_norm[...], c.rms_norm_eps),
            rms_norm(hidden, self.hidden_norm[...], c.rms_norm_eps),
        ]
        x = jnp.concatenate(both, axis=-1) @ self.project[...]
        number = jnp.full(1, c.num_layers, jnp.int32)
        x, pages = run(self.layer, x, pages, number, inputs, pages.shape[0] // self.build.cache_layers)
        return rms_norm(x, self.final_norm[...], c.rms_norm_eps), pages
