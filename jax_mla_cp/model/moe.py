"""Mixture of experts: the routers of DeepSeek-V2 and V3, and experts divided over the mesh.

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

from jax_mla_cp.attention.numerics import einsum_float32
from jax_mla_cp.config.model import ModelConfig
from jax_mla_cp.mesh import TP
from jax_mla_cp.model.build import Build
from jax_mla_cp.model.experts import apply_experts
from jax_mla_cp.model.fp8 import Fp8, Matrices, ScaledMatrices, stack_matrices, take_matrices
from jax_mla_cp.model.fp8_rows import Rows
from jax_mla_cp.model.grouped_matmul import multiplies_fp8
from jax_mla_cp.model.layers import Mlp
from jax_mla_cp.model.params import ParamFactory
from jax_mla_cp.model.quantize import quantize
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
            self.bias = param(c.n_routed_experts, dtype=float32)
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
            bias = self.bias[...] if self.build.config.routing_bias else None
            expert, weight = route(x, self.router[...], bias, self.build.config)
            expert = jnp.where(valid[:, None], expert, self.build.padded_experts)  # padding goes to no expert
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
        rows = quantize(x, self.build.grouped_matmul) if w8a8 else x
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
        return [
            weight.matrices() if isinstance(weight, Fp8) else stack_matrices(weight[...], dims)
            for weight, dims in ((self.gate_up, 3), (self.down, 2))
        ]

    def _matrices(
        self, stacks: list[Matrices], layer: jax.Array | int, share: int, w8a8: bool
    ) -> tuple[Matrices, Matrices, jax.Array | int]:
        """What `grouped_matmul` is given: `gate_up`, `down`, and the number of the layer's first expert in them.

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


def route(
    x: Float[Array, "T D"], router: Float[Array, "D E"], bias: Float[Array, " E"] | None, config: ModelConfig
) -> tuple[Int32[Array, "T k"], Float[Array, "T k"]]:
    """Each token's experts and their weights, in float32 at full precision: rounding could change which expert is selected.

    - `noaux_tc` (MoEGate of DeepSeek-V3's modeling_deepseek.py; arXiv:2412.19437, section 2.1.2): scores are sigmoids.
      The bias takes part in the choice only: the `topk_group` groups whose two largest biased scores have the largest
      sum, and among their experts the top k. Weights are the unbiased scores.
    - `group_limited_greedy` (MoEGate of DeepSeek-V2's; arXiv:2405.04434, section 2.2.2): scores are a softmax over all
      experts, there is no bias, and a group's score is its largest.
    - `greedy` (DeepSeek-V2-Lite): the same without groups.

    Experts of other groups are masked with -inf. DeepSeek-V2's code has 0 there, which is the same: its scores are
    positive, and one that rounds to 0 weighs nothing, whichever expert it is of.
    """
    c = config
    logits = _logits(x, router)
    scores = jax.nn.softmax(logits, axis=-1) if bias is None else jax.nn.sigmoid(logits)
    choice = scores if bias is None else scores + bias
    if c.n_group > 1:
        grouped = choice.reshape(*choice.shape[:-1], c.n_group, -1)
        top = _top_k(grouped, 1 if bias is None else 2)
        group_score = jnp.take_along_axis(grouped, top, axis=-1).sum(-1)
        kept = jax.nn.one_hot(_top_k(group_score, c.topk_group), c.n_group, dtype=jnp.bool_).any(-2)
        choice = jnp.where(kept[..., None], grouped, -jnp.inf).reshape(choice.shape)
    expert = _top_k(choice, c.experts_per_token)
    weight = jnp.take_along_axis(scores, expert, axis=-1)
    if c.norm_topk_prob:
        weight = weight / (weight.sum(-1, keepdims=True) + 1e-20)
    return expert, weight * c.routed_scaling_factor


def _logits(x: Float[Array, "T D"], router: Float[Array, "D E"]) -> Float[Array, "T E"]:
    """`x @ router`, as exact as in float32.

    For a bfloat16 x each of the router's numbers is the sum of three bfloat16 ones: their products with x are exact in
    float32, and three products on the tensor cores take a fraction of the time of one in float32.
    """
    if x.dtype != jnp.bfloat16:
        return jnp.dot(x.astype(jnp.float32), router, precision=lax.Precision.HIGHEST)
    parts, rest = [], router
    for _ in range(3):
        # Not astype there and back, which XLA may leave out.
        part = lax.reduce_precision(rest, exponent_bits=8, mantissa_bits=7)
        parts.append(part.astype(jnp.bfloat16))
        rest = rest - part
    return einsum_float32("td,dpe->tpe", x, jnp.stack(parts, axis=1)).sum(1)


def _top_k(values: Float[Array, "*T n"], k: int) -> Int32[Array, "*T k"]:
    """The indices of the k largest values, as `lax.top_k` gives them, which on GPUs sorts all values; the first of equal ones.

    At least k values must be above -inf (`ModelConfig` checks that the chosen groups have k experts).
    """
    index = lax.broadcasted_iota(jnp.int32, values.shape, values.ndim - 1)
    top = []
    for _ in range(k):
        top.append(jnp.argmax(values, axis=-1).astype(jnp.int32))
        values = jnp.where(index == top[-1][..., None], -jnp.inf, values)
    return jnp.stack(top, axis=-1)
