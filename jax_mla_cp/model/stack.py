"""`Layer`, a decoder layer, and `LayerStack`, equal layers under `lax.scan`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Bool, Float, Int32

from jax_mla_cp.mesh import TP
from jax_mla_cp.model.build import Build
from jax_mla_cp.model.layer_inputs import LayerInputs
from jax_mla_cp.model.layers import Mlp
from jax_mla_cp.model.mla import Mla
from jax_mla_cp.model.moe import Moe
from jax_mla_cp.model.norm import add_norm
from jax_mla_cp.model.params import ParamFactory

M = TypeVar("M", bound=nnx.Module)
S = TypeVar("S")


class Residual(NamedTuple):
    """The residual stream between two halves of layers: `x`, and the output of the last half. The next half adds it in the kernel of
    its norm."""

    x: Float[Array, "T D"]
    part: Float[Array, "T D"]

    @classmethod
    def begin(cls, x: Float[Array, "T D"]) -> Residual:
        """The stream before the first layer."""
        return cls(x, jnp.zeros_like(x))


class Layer(nnx.Module):
    """A decoder layer: attention, then an MLP or experts. Each reads the normalized residual stream and is added to it.

    The modules return this rank's part of their sums over tp; the layer sums them.
    """

    def __init__(self, param: ParamFactory, build: Build, *, experts: bool):
        c = build.config
        self.build = build
        self.attn_norm = param(c.hidden_size, whole=True)
        self.mla = Mla(param, build)
        self.mlp_norm = param(c.hidden_size, whole=True)
        self.mlp = Moe(param, build) if experts else Mlp(param, c.hidden_size, c.intermediate_size)

    def __call__(
        self,
        residual: Residual,
        pages: Float[Array, "pages page_size C"],
        number: Int32[Array, ""],
        index: Int32[Array, ""],
        inputs: LayerInputs,
    ) -> tuple[Residual, Float[Array, "pages page_size C"]]:
        """Returns the residual stream, and the cache with the layer's latents written.

        Args:
          number: the layer's number in the cache.
          index: the layer's place in its stack, whose norms and matrices it is given whole.
        """
        residual, pages = self.attention(residual, pages, number, index, inputs)
        return self.feed_forward(residual, index, inputs.valid), pages

    def attention(
        self, residual: Residual, pages: jax.Array, number: jax.Array, index: jax.Array, inputs: LayerInputs
    ) -> tuple[Residual, Float[Array, "pages page_size C"]]:
        """The first half of the layer."""
        with jax.named_scope("mla"):
            x, normed = self._add_norm(residual, self.attn_norm, index)
            part, pages = self.mla(normed, pages, number, index, inputs)
            return Residual(x, self.build.axes.psum(part, TP)), pages

    def feed_forward(self, residual: Residual, index: Int32[Array, ""], valid: Bool[Array, " T"]) -> Residual:
        """The second half of the layer: the MLP, or the experts."""
        with jax.named_scope("mlp"):
            x, normed = self._add_norm(residual, self.mlp_norm, index)
            part = self.mlp(normed, valid, index) if isinstance(self.mlp, Moe) else self.mlp(normed, index)
            return Residual(x, self.build.axes.psum(part, TP))

    def _add_norm(
        self, residual: Residual, weight: nnx.Param[Any], index: Int32[Array, ""]
    ) -> tuple[Float[Array, "T D"], Float[Array, "T D"]]:
        config = self.build.config
        return add_norm(*residual, weight[...], index, config.rms_norm_eps, kernels=self.build.kernels)


class LayerStack(nnx.Module):
    """Equal layers, run under `lax.scan` with the cache carried along.

    The stack's parameters have the names of a `Layer`'s and a leading dimension [count]: the tree has no level for the stack,
    `moe.mla.kv_a` is [count, R + r, D]. Each iteration of the scan makes a `Layer` of its slice of them. Parameters that
    kernels read in place are not sliced: each layer gets the whole stack's, and its index (see `ParamFactory`).

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
        self, residual: Residual, pages: Float[Array, "pages page_size C"], inputs: LayerInputs
    ) -> tuple[Residual, Float[Array, "pages page_size C"]]:
        """Runs all layers. Returns the residual stream, and the cache with the layers' latents written."""

        def run(layer: Layer, residual: Residual, pages: jax.Array, index: jax.Array) -> tuple[Residual, jax.Array]:
            return layer(residual, pages, self.first + index, index, inputs)

        layer = Layer(ParamFactory(self.build), self.build, experts=self.experts)
        return scan_layers(run, layer, self, residual, pages, self.count)


def scan_layers(
    run: Callable[[M, S, jax.Array, jax.Array], tuple[S, jax.Array]],
    layer: M,
    stack: nnx.Module,
    state: S,
    pages: Float[Array, "pages page_size C"],
    count: int,
) -> tuple[S, Float[Array, "pages page_size C"]]:
    """Calls `run(layer, state, pages, index)` for each layer of a stack, and hands its result to the next.

    Args:
      layer: a layer whose parameters are only declared: `run` gets it with its slice of the stack's parameters.
      stack: has the parameters of `count` layers, by the same names.
    """
    graphdef = nnx.graphdef(layer)
    _, *states = nnx.split(stack, lambda path, param: param.get_metadata("whole"), ...)
    whole, sliced = states

    def step(carry: tuple[S, jax.Array], xs: tuple[Any, jax.Array]) -> tuple[tuple[S, jax.Array], None]:
        (state, pages), (params, index) = carry, xs
        return run(nnx.merge(graphdef, whole, params), state, pages, index), None

    (state, pages), _ = lax.scan(step, (state, pages), (sliced, jnp.arange(count)))
    return state, pages
