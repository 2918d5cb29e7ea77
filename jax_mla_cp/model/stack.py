"""A decoder layer, and runs of equal ones."""

from __future__ import annotations

from typing import Any

import jax
from flax import nnx
from jax import lax
from jaxtyping import Array, Float, Int32

from jax_mla_cp.mesh import TP
from jax_mla_cp.model.context import Build, Declare, LayerInputs
from jax_mla_cp.model.layers import Mlp, rms_norm
from jax_mla_cp.model.mla import Mla
from jax_mla_cp.model.moe import Moe


class Layer(nnx.Module):
    """The `count` layers from number `first` on, their parameters stacked for `run`; called, the one of its number."""

    def __init__(self, build: Build, first: int, count: int, *, experts: bool):
        c = build.config
        declare = Declare(build, count)
        self.build = build
        self.first = first
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
            out = self.mlp(normed, inputs.valid, layer - self.first) if isinstance(self.mlp, Moe) else self.mlp(normed)
            return x + self.build.axes.psum(out, TP), pages


def run(
    stack: Any,
    x: Float[Array, "T D"],
    pages: Float[Array, "pages page_size C"],
    numbers: Int32[Array, " layers"],
    inputs: LayerInputs,
    pages_per_layer: int,
) -> tuple[Float[Array, "T D"], Float[Array, "pages page_size C"]]:
    """The layers of one stack (a `Layer`, or what is called like one) under `lax.scan`, the cache carried along."""
    graphdef, *states = nnx.split(stack, lambda path, param: param.get_metadata("whole"), ...)
    whole, sliced = states

    def step(carry: tuple[jax.Array, jax.Array], xs: tuple[Any, jax.Array]) -> tuple[tuple[jax.Array, jax.Array], None]:
        params, number = xs
        return nnx.merge(graphdef, whole, params)(*carry, number, inputs, pages_per_layer), None

    (x, pages), _ = lax.scan(step, (x, pages), (sliced, numbers))
    return x, pages
