"""Rotary embedding and the dense MLP."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int32
from numpy.typing import NDArray

from jax_mla_cp.config.rope import RopeConfig
from jax_mla_cp.mesh import TP
from jax_mla_cp.model.linear import linear
from jax_mla_cp.model.params import ParamFactory


def rope_frequencies(dim: int, rope: RopeConfig) -> NDArray[np.float32]:
    """The [dim / 2] frequencies in radians per position, YaRN's if the config has it (arXiv:2309.00071, section 3.2).

    Frequencies that turn more than `beta_fast` times within the original context stay, those that turn less than
    `beta_slow` times are divided by `factor`, and a linear ramp is between. The ramp's ends are whole numbers, and at
    least 0.001 apart, as in DeepSeek-V3's inference/model.py (`precompute_freqs_cis`): with `beta_fast == beta_slow`
    it is a step.
    """
    pair = np.arange(0, dim, 2, dtype=np.float32) / np.float32(dim)
    plain = (1.0 / (np.float32(rope.theta) ** pair)).astype(np.float32)
    if not rope.yarn:
        return plain

    def turns_at(rotations: float) -> float:
        return dim * math.log(rope.original_max_position / (rotations * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = max(math.floor(turns_at(rope.beta_fast)), 0), min(math.ceil(turns_at(rope.beta_slow)), dim - 1)
    ramp = (np.arange(dim // 2, dtype=np.float32) - low) / (high - low if high != low else 0.001)
    stretched = np.clip(ramp, 0, 1)
    return (plain / np.float32(rope.factor) * stretched + plain * (1 - stretched)).astype(np.float32)


def rope_angles(
    positions: Int32[Array, " T"], dim: int, rope: RopeConfig
) -> tuple[Float[Array, "T dim/2"], Float[Array, "T dim/2"]]:
    """cos and sin of each token's angles, in float32, times the config's amplitude."""
    angle = positions[:, None].astype(jnp.float32) * rope_frequencies(dim, rope)
    return jnp.cos(angle) * rope.amplitude, jnp.sin(angle) * rope.amplitude


def rotate(x: Float[Array, "T *n r"], cos: Float[Array, "T r/2"], sin: Float[Array, "T r/2"]) -> Float[Array, "T *n r"]:
    """Rotates pairs (i, i + r/2): the loader has reordered the weights of checkpoints that pair neighbors."""
    if x.ndim == 3:
        cos, sin = cos[:, None], sin[:, None]
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)


class Mlp(nnx.Module):
    """Gated MLP, `down(silu(gate x) * up x)`, its width over tp. Returns this rank's part of the sum over tp."""

    def __init__(self, param: ParamFactory, hidden: int, width: int):
        self.build = param.build
        self.gate_up = param.matrix(2, width, hidden, spec=(None, TP, None))
        self.down = param.matrix(hidden, width, spec=(None, TP))

    def __call__(self, x: Float[Array, "T D"], layer: Int32[Array, ""] | int = 0) -> Float[Array, "T D"]:
        """`layer`: the layer's index in its stack (see `linear`)."""
        gate, up = jnp.split(linear(x, self.gate_up, layer, self.build), 2, axis=-1)
        return linear(jax.nn.silu(gate) * up, self.down, layer, self.build)
