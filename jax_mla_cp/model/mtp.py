"""Multi-token prediction: a layer after the last one, which predicts one token further than the model.

DeepSeek-V3, arXiv:2412.19437, section 2.2; as its weights are run by SGLang's deepseek_nextn.py: the hidden state is the one
after the final norm, embedding and head are the model's own, and a state that is used again is the one after this layer's
norm. (vLLM's deepseek_mtp.py zeroes the embedding at position 0; here, as in SGLang, no position is different.)
"""

from __future__ import annotations

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from jax_mla_cp.model.build import Build
from jax_mla_cp.model.layer_inputs import LayerInputs
from jax_mla_cp.model.norm import rms_norm
from jax_mla_cp.model.params import ParamFactory
from jax_mla_cp.model.stack import LayerStack, Residual


class Mtp(nnx.Module):
    """Two norms and a projection, a stack of one layer, and a norm. Its latents are the cache's last layer."""

    def __init__(self, build: Build):
        c = build.config
        param = ParamFactory(build)
        self.build = build
        self.embed_norm = param(c.hidden_size)
        self.hidden_norm = param(c.hidden_size)
        self.project = param(2 * c.hidden_size, c.hidden_size)
        self.layer = LayerStack(build, c.num_layers, 1, experts=c.n_routed_experts > 0)
        self.final_norm = param(c.hidden_size)

    def __call__(
        self,
        embedded: Float[Array, "T D"],
        hidden: Float[Array, "T D"],
        pages: Float[Array, "pages page_size C"],
        inputs: LayerInputs,
    ) -> tuple[Float[Array, "T D"], Float[Array, "pages page_size C"]]:
        """Returns the states from which the head predicts the token at p + 2, for tokens at positions p; and the cache.

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
        (x, part), pages = self.layer(Residual.begin(x), pages, inputs)
        return rms_norm(x + part, self.final_norm[...], c.rms_norm_eps), pages
