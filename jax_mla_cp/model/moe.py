"""Mixture of experts: a router, and experts divided over the mesh.

No token is ever dropped, and the cost follows the rows that exist. Tokens are replicated over tp already, so experts over
tp alone exchange nothing: every rank computes its own experts' part of each token and the layer's psum adds them up. So it is where tp
divides each expert's width: every rank computes a part of each of a token's experts, and none has more to do than another.
Where cp or dp divide the experts too, tokens are gathered over those axes and the results scattered back.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Bool, Float, Int32

from jax_mla_cp.mesh import TP
from jax_mla_cp.model.build import Build
from jax_mla_cp.model.experts import apply_experts
from jax_mla_cp.model.fp8 import Matrices, ScaledMatrices, matrices_of, take_matrices
from jax_mla_cp.model.fp8_rows import Rows
from jax_mla_cp.model.grouped_matmul import multiplies_fp8
from jax_mla_cp.model.layers import Mlp
from jax_mla_cp.model.params import ParamFactory
from jax_mla_cp.model.quantize import quantize
from jax_mla_cp.model.router import route
from jax_mla_cp.model.w8a8 import quantizes_rows

# Gathered tokens in a slice: with the windows of `apply_experts` it bounds the buffers. 32K and a bucket's excess over it.
_MAX_TOKENS = 36 << 10


class Moe(nnx.Module):
    """Routed and shared experts. Returns this rank's part of the sum over tp."""

    def __init__(self, param: ParamFactory, build: Build):
        c = build.config
        self.build = build
        float32 = jnp.dtype(jnp.float32)
        self.router = param(c.hidden_size, c.n_routed_experts, dtype=float32)
        if c.routing_bias:
            self.bias = param(c.n_routed_experts, dtype=float32, whole=True)
        experts = build.padded_experts
        width, divided = c.moe_intermediate_size, build.ep_axes or None
        tp = None if build.ep_axes else TP  # of the width
        self.gate_up = param.matrix(experts, 2, width, c.hidden_size, spec=(divided, None, tp, None), experts=True)
        self.down = param.matrix(experts, c.hidden_size, width, spec=(divided, None, tp), experts=True)
        if c.n_shared_experts:
            self.shared = Mlp(param, c.hidden_size, c.n_shared_experts * c.moe_intermediate_size)

    def __call__(
        self, x: Float[Array, "T D"], valid: Bool[Array, " T"], layer: Int32[Array, ""] | int = 0
    ) -> Float[Array, "T D"]:
        """`layer`: the layer's index in its stack, all of whose experts' weights this layer has (see `LayerStack`)."""
        with jax.named_scope("router"):
            expert, weight = route(
                x,
                self.router[...],
                self.bias[...] if self.build.config.routing_bias else None,
                self.build.config,
                layer=layer,
                valid=valid,
                no_expert=self.build.padded_experts,  # padding goes to no expert
                kernels=self.build.kernels,
            )
        out = self._routed(x, expert, weight, layer)
        if self.build.config.n_shared_experts:
            with jax.named_scope("shared"):
                out = out + self.shared(x, layer)
        return out

    def _routed(self, x: jax.Array, expert: jax.Array, weight: jax.Array, layer: jax.Array | int) -> jax.Array:
        """The routed experts' output for this rank's tokens, a slice of tokens at a time."""
        gather_over = tuple(axis for axis in self.build.ep_axes if axis != TP)
        axes = self.build.axes
        tokens = len(x)
        # Where tp divides the width, a device has rows for all of a token's experts, not for one tp'th of them.
        copies = 1 if self.build.ep_axes else axes.size(TP)
        slices = -(-tokens * axes.size(gather_over) * copies // _MAX_TOKENS)
        size = -(-tokens // slices)
        stacks = self._stacks()
        # This device's even part of the pairs in a slice.
        share = -(-size * expert.shape[1] * axes.size(gather_over) // axes.size(self.build.ep_axes))
        # Quantized once for all of a token's experts, and before it travels.
        w8a8 = all(quantizes_rows(stack, share, self._local, self.build.fp8_compute) for stack in stacks)
        rows = quantize(x, kernels=self.build.kernels) if w8a8 else x
        experts = self._matrices(stacks, layer, share, w8a8)

        def apply(part: tuple[Rows, jax.Array, jax.Array]) -> jax.Array:
            if not gather_over:
                return self._experts(*part, *experts)
            rows, expert, weight = jax.tree.map(lambda array: axes.all_gather(array, gather_over), part)
            return axes.psum_scatter(self._experts(rows, expert, weight, *experts), gather_over)

        if slices == 1:
            return apply((rows, expert, weight))
        pad = slices * size - tokens
        no_expert = self.build.padded_experts

        def split(a: jax.Array, fill: int) -> jax.Array:
            return jnp.pad(a, ((0, pad), (0, 0)), constant_values=fill).reshape(slices, size, a.shape[1])

        split_rows = jax.tree.map(lambda array: split(array, 0), rows)
        out = lax.map(apply, (split_rows, split(expert, no_expert), split(weight, 0)))
        return out.reshape(slices * size, -1)[:tokens]

    def _stacks(self) -> list[Matrices]:
        """`gate_up` and `down` of this device's experts of all layers: XLA would copy a slice for the kernel."""
        return [matrices_of(self.gate_up), matrices_of(self.down)]

    def _matrices(
        self, stacks: list[Matrices], layer: jax.Array | int, share: int, w8a8: bool
    ) -> tuple[Matrices, Matrices, jax.Array | int]:
        """Returns the operands of `grouped_matmul`: `gate_up`, `down`, and the number of the layer's first expert in them.

        FP8 that is not multiplied as it is gets dequantized here, before the loops over slices and windows, this layer's only:
        2.8 GB for DeepSeek-V3 at tp=8, in a buffer that the next layer uses again.
        """
        first, count = layer * self._local, self._local
        if not w8a8 and any(
            isinstance(stack, ScaledMatrices) and not multiplies_fp8(stack, share, count, self.build.grouped_matmul)
            for stack in stacks
        ):
            with jax.named_scope("dequantize"):
                gate_up, down = (take_matrices(stack, first, count) for stack in stacks)
                return gate_up, down, 0
        return stacks[0], stacks[1], first

    @property
    def _local(self) -> int:
        """The number of experts on a device."""
        return self.build.padded_experts // self.build.axes.size(self.build.ep_axes)

    def _experts(
        self,
        x: Rows,
        expert: Int32[Array, "M k"],
        weight: Float[Array, "M k"],
        gate_up: Matrices,
        down: Matrices,
        first: jax.Array | int,
    ) -> Float[Array, "M D"]:
        """The sum of each token's experts that are on this device."""
        ep, local = self.build.ep_axes, self._local
        return apply_experts(
            x,
            expert - self.build.axes.index(ep) * local,
            weight,
            gate_up,
            down,
            num_experts=local,
            first=first,
            ep_size=self.build.axes.size(ep),
            implementation=self.build.grouped_matmul,
        )
