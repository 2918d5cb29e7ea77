"""The loss, the optimizer, and the stages of rising length."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax

from default_model import network
from jax_mla_cp.config.model import ModelConfig

_MTP_WEIGHT = 0.2
_BIAS_SPEED = 1e-3  # DeepSeek-V3's: arXiv:2412.19437, section 4.2


@dataclasses.dataclass(frozen=True)
class Stage:
    length: int
    batch: int
    steps: int


STAGES = (Stage(512, 256, 1400), Stage(2048, 64, 700), Stage(8192, 16, 300), Stage(20480, 8, 260))
"""Retrieval does not extrapolate: what is to be found at 16K must be looked for at more than 16K."""
PEAK, WARMUP, DECAY_FROM = 2e-3, 300, 0.55
ROUNDED_FROM = 0.8
"""From this part of the steps on the weights are rounded to FP8 in every step, as they will be in the end."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
    params: network.Params
    optimizer: Any


def total_steps(stages: tuple[Stage, ...]) -> int:
    return sum(stage.steps for stage in stages)


def optimizer(steps: int) -> optax.GradientTransformation:
    """AdamW: warm-up, constant, linear to a hundredth. What has one dimension does not decay."""
    decay_from = int(DECAY_FROM * steps)
    rate = optax.join_schedules(
        [
            optax.linear_schedule(0.0, PEAK, WARMUP),
            optax.constant_schedule(PEAK),
            optax.linear_schedule(PEAK, PEAK / 100, steps - decay_from),
        ],
        [WARMUP, decay_from],
    )

    def mask(params: network.Params) -> dict[str, bool]:
        return {name: w.ndim > 1 for name, w in params.items()}

    return optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(rate, b1=0.9, b2=0.95, weight_decay=0.1, mask=mask))


def loss(
    params: network.Params, tokens: jax.Array, kind: jax.Array, c: ModelConfig, *, rounded: bool, cudnn: bool
) -> tuple[jax.Array, tuple[jax.Array, jax.Array, dict[str, jax.Array]]]:
    """Text and answers count as much as each other, although answers are few tokens.

    Args:
      tokens: [B, S + 1]; kind: [B, S], of the targets: 0 not, 1 text, 2 answer.

    Returns: the loss; (of the text, of the answers, the load of the experts).
    """
    if rounded:
        params = network.rounded(params)
    half = {name: w.astype(jnp.bfloat16) if _in_half(name) and cudnn else w for name, w in params.items()}
    logits, further, loads = network.forward(half, tokens[:, :-1], c, cudnn=cudnn)
    main = optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:])
    mtp = optax.softmax_cross_entropy_with_integer_labels(further[:, :-1], tokens[:, 2:])
    text, answers = _mean(main, kind == 1), _mean(main, kind == 2)
    ahead = _mean(mtp, kind[:, 1:] == 1) + _mean(mtp, kind[:, 1:] == 2)
    return text + answers + _MTP_WEIGHT * ahead, (text, answers, loads)


def _in_half(name: str) -> bool:
    return not name.endswith(("gate.weight", "correction_bias"))


def _mean(values: jax.Array, where: jax.Array) -> jax.Array:
    return jnp.where(where, values, 0).sum() / jnp.maximum(where.sum(), 1)


@functools.partial(jax.jit, static_argnames=("c", "steps", "rounded", "cudnn"), donate_argnums=0)
def train_step(
    state: State, tokens: jax.Array, kind: jax.Array, *, c: ModelConfig, steps: int, rounded: bool, cudnn: bool
) -> tuple[State, jax.Array]:
    """One step; returns the losses [text, answers]."""
    grads, (text, answers, loads) = jax.grad(loss, has_aux=True)(
        state.params, tokens, kind, c, rounded=rounded, cudnn=cudnn
    )
    updates, opt = optimizer(steps).update(grads, state.optimizer, state.params)
    params = optax.apply_updates(state.params, updates)
    # Balance without a loss: an expert that has too little to do gets a larger bias (arXiv:2408.15664).
    for name, load in loads.items():
        params[name] = state.params[name] + _BIAS_SPEED * jnp.sign(1 / len(load) - load)
    return State(params, opt), jnp.stack([text, answers])


@functools.partial(jax.jit, static_argnames=("c", "rounded", "cudnn"))
def score(
    params: network.Params, tokens: jax.Array, kind: jax.Array, *, c: ModelConfig, rounded: bool, cudnn: bool
) -> tuple[jax.Array, jax.Array]:
    """(sequences whose answer is right in every token, mean loss of the text)."""
    if rounded:
        params = network.rounded(params)
    half = {name: w.astype(jnp.bfloat16) if _in_half(name) and cudnn else w for name, w in params.items()}
    logits, _, _ = network.forward(half, tokens[:, :-1], c, cudnn=cudnn)
    right = (logits.argmax(-1) == tokens[:, 1:]) | (kind != 2)
    text = _mean(optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]), kind == 1)
    return right.all(-1).mean(), text
