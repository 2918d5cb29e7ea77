"""`Layer`, a decoder layer, and `LayerStack`, equal layers under `lax.scan`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Bool, Float, Int32

from jax_mla_cp.mesh import TP
from jax_mla_cp.model.build import Build
from jax_mla_cp.model.layer_inputs import LayerInputs
from jax_mla_cp.model.layers import Mlp, rms_norm
from jax_mla_cp.model.mla import Mla
from jax_mla_cp.model.moe import Moe
from jax_mla_cp.model.params import ParamFactory

M = TypeVar("M", bound=nnx.Module)


class Layer(nnx.Module):
    """A decoder layer: attention, then an MLP or experts, each after a norm and added to the residual stream.

    The modules return this rank's part of their sums over tp; the layer sums them.
    """

    def __init__(self, param: ParamFactory, build: Build, *, experts: bool):
        c = build.config
        self.build = build
        self.attn_norm = param(c.hidden_size)
        self.mla = Mla(param, build)
        self.mlp_norm = param(c.hidden_size)
        self.mlp = Moe(param, build) if experts else Mlp(param, c.hidden_size, c.intermediate_size)

    def __call__(
        self,
        x: Float[Array, "T D"],
        pages: Float[Array, "pages page_size C"],
        number: Int32[Array, ""],
        index: Int32[Array, ""],
        inputs: LayerInputs,
    ) -> tuple[Float[Array, "T D"], Float[Array, "pages page_size C"]]:
        """Returns the hidden states, and the cache with the layer's latents written.

        Args:
          number: the layer's number in the cache.
          index: the layer's place in its stack, where its weights in FP8 and its experts' are.
        """
        x, pages = self.add_attention(x, pages, number, index, inputs)
        return self.add_mlp(x, index, inputs.valid), pages

    def add_attention(
        self, x: jax.Array, pages: jax.Array, number: jax.Array, index: jax.Array, inputs: LayerInputs
    ) -> tuple[Float[Array, "T D"], Float[Array, "pages page_size C"]]:
        """The first half of the layer: x plus the attention of its norm, and the cache."""
        with jax.named_scope("mla"):
            part, pages = self.mla(self._norm(x, self.attn_norm), pages, number, index, inputs)
            return x + self.build.axes.psum(part, TP), pages

    def add_mlp(self, x: jax.Array, index: jax.Array, valid: Bool[Array, " T"]) -> Float[Array, "T D"]:
        """The second half of the layer: x plus the MLP, or the experts, of its norm."""
        with jax.named_scope("mlp"):
            normed = self._norm(x, self.mlp_norm)
            part = self.mlp(normed, valid, index) if isinstance(self.mlp, Moe) else self.mlp(normed, index)
            return x + self.build.axes.psum(part, TP)

    def _norm(self, x: jax.Array, weight: nnx.Param[Any]) -> jax.Array:
        return rms_norm(x, weight[...], self.build.config.rms_norm_eps)


class LayerStack(nnx.Module):
    """Equal layers, run under `lax.scan` with the cache carried along.

    The stack's parameters have the names of a `Layer`'s and a leading dimension [count]: the tree has no level for the stack,
    `moe.mla.kv_a` is [count, R + r, D]. Each iteration of the scan makes a `Layer` of its slice of them. Only the experts'
    weights, and those in FP8, are not sliced: each layer gets those of the whole stack, and its index in them (see
    `ParamFactory`).

    Args:
      first: the first layer's number in the cache.
      count: the number of layers.
      experts: the layers have experts, not dense MLPs.
    """

    def __init__(self, build: Build, first: int, count: int, *, experts: bool):
        self.build = build
        self.first = first
        self.count = count
        self.experts = experts
        stacked = Layer(ParamFactory(build, count), build, experts=experts)
        self.attn_norm = stacked.attn_norm
        self.mla = stacked.mla
        self.mlp_norm = stacked.mlp_norm
        self.mlp = stacked.mlp

    def __call__(
        self, x: Float[Array, "T D"], pages: Float[Array, "pages page_size C"], inputs: LayerInputs
    ) -> tuple[Float[Array, "T D"], Float[Array, "pages page_size C"]]:
        """Runs all layers. Returns the hidden states, and the cache with the layers' latents written."""

        def run(layer: Layer, x: jax.Array, pages: jax.Array, index: jax.Array) -> tuple[jax.Array, jax.Array]:
            return layer(x, pages, self.first + index, index, inputs)

        layer = Layer(ParamFactory(self.build), self.build, experts=self.experts)
        return scan_layers(run, layer, self, x, pages, self.count)


def scan_layers(
    run: Callable[[M, jax.Array, jax.Array, jax.Array], tuple[jax.Array, jax.Array]],
    layer: M,
    stack: nnx.Module,
    x: Float[Array, "T D"],
    pages: Float[Array, "pages page_size C"],
    count: int,
) -> tuple[Float[Array, "T D"], Float[Array, "pages page_size C"]]:
    """Calls `run(layer, x, pages, index)` for each layer of a stack, and hands its result to the next.

    Args:
      layer: a layer whose parameters are only declared: `run` gets it with its slice of the stack's parameters.
      stack: has the parameters of `count` layers, by the same names.
    """
    graphdef = nnx.graphdef(layer)
    _, *states = nnx.split(stack, lambda path, param: param.get_metadata("whole"), ...)
    whole, sliced = states

    def step(carry: tuple[jax.Array, jax.Array], xs: tuple[Any, jax.Array]) -> tuple[tuple[jax.Array, jax.Array], None]:
        (x, pages), (params, index) = carry, xs
        return run(nnx.merge(graphdef, whole, params), x, pages, index), None

    (x, pages), _ = lax.scan(step, (x, pages), (sliced, jnp.arange(count)))
    return x, pages
