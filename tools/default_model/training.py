"""Loss, optimizer, and the stages of increasing length."""

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
"""Retrieval does not extrapolate: to work at 16K it must be trained at more than 16K."""
PEAK, WARMUP, DECAY_FROM = 2e-3, 300, 0.55
QAT_FROM = 0.8
"""Fraction of the steps after which every step rounds the weights to FP8 (quantization-aware training)."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
    params: network.Params
    optimizer: Any


def total_steps(stages: tuple[Stage, ...]) -> int:
    return sum(stage.steps for stage in stages)


def optimizer(steps: int) -> optax.GradientTransformation:
    """AdamW with warmup, a constant phase and a linear decay to a hundredth. Only matrices have weight decay."""
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
    params: network.Params, tokens: jax.Array, kind: jax.Array, c: ModelConfig, *, fp8: bool, cudnn: bool
) -> tuple[jax.Array, tuple[jax.Array, jax.Array, dict[str, jax.Array]]]:
    """Mean loss of text plus mean loss of answers, which have equal weight although answers are few tokens; plus MTP's.

    Args:
      tokens: [B, S + 1].
      kind: [B, S], the kind of each target: 0 for none, 1 for text, 2 for an answer.
      fp8: round the weights to FP8.

    Returns: the loss; (loss of text, loss of answers, load of the experts).
    """
    if fp8:
        params = network.fake_quantize(params)
    cast = {name: w.astype(jnp.bfloat16) if _in_bfloat16(name) and cudnn else w for name, w in params.items()}
    logits, mtp_logits, loads = network.forward(cast, tokens[:, :-1], c, cudnn=cudnn)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:])
    mtp_losses = optax.softmax_cross_entropy_with_integer_labels(mtp_logits[:, :-1], tokens[:, 2:])
    text, answers = _mean(losses, kind == 1), _mean(losses, kind == 2)
    mtp = _mean(mtp_losses, kind[:, 1:] == 1) + _mean(mtp_losses, kind[:, 1:] == 2)
    return text + answers + _MTP_WEIGHT * mtp, (text, answers, loads)


def _in_bfloat16(name: str) -> bool:
    return not name.endswith(("gate.weight", "correction_bias"))


def _mean(values: jax.Array, where: jax.Array) -> jax.Array:
    return jnp.where(where, values, 0).sum() / jnp.maximum(where.sum(), 1)


@functools.partial(jax.jit, static_argnames=("c", "steps", "fp8", "cudnn"), donate_argnums=0)
def train_step(
    state: State, tokens: jax.Array, kind: jax.Array, *, c: ModelConfig, steps: int, fp8: bool, cudnn: bool
) -> tuple[State, jax.Array]:
    """Runs a step. Returns the new state and the losses [text, answers]."""
    grads, (text, answers, loads) = jax.grad(loss, has_aux=True)(state.params, tokens, kind, c, fp8=fp8, cudnn=cudnn)
    updates, opt = optimizer(steps).update(grads, state.optimizer, state.params)
    params = optax.apply_updates(state.params, updates)
    # Load balancing without an auxiliary loss: an underloaded expert gets a larger bias (arXiv:2408.15664).
    for name, load in loads.items():
        params[name] = state.params[name] + _BIAS_SPEED * jnp.sign(1 / len(load) - load)
    return State(params, opt), jnp.stack([text, answers])


@functools.partial(jax.jit, static_argnames=("c", "fp8", "cudnn"))
def score(
    params: network.Params, tokens: jax.Array, kind: jax.Array, *, c: ModelConfig, fp8: bool, cudnn: bool
) -> tuple[jax.Array, jax.Array]:
    """Returns the fraction of sequences whose answer is entirely right, and the mean loss of the text."""
    if fp8:
        params = network.fake_quantize(params)
    cast = {name: w.astype(jnp.bfloat16) if _in_bfloat16(name) and cudnn else w for name, w in params.items()}
    logits, _, _ = network.forward(cast, tokens[:, :-1], c, cudnn=cudnn)
    correct = (logits.argmax(-1) == tokens[:, 1:]) | (kind != 2)
    text = _mean(optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]), kind == 1)
    return correct.all(-1).mean(), text
