"""Sampling: by the right distribution, and by (seed, position) alone."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_mla_cp.batch.arrays import SamplingArrays
from jax_mla_cp.step.sampling import sample

LOGITS = jnp.log(jnp.array([0.4, 0.3, 0.15, 0.1, 0.05]))


def how(count: int, **fields: object) -> SamplingArrays:
    defaults: dict[str, object] = {
        "temperature": np.ones(count, np.float32),
        "top_p": np.ones(count, np.float32),
        "top_k": np.zeros(count, np.int32),
        "min_p": np.zeros(count, np.float32),
        "seed": np.stack([np.arange(count), np.zeros(count)], 1).astype(np.uint32),
        "position": np.zeros(count, np.int32),
    }
    return SamplingArrays(**{k: jnp.asarray(v) for k, v in (defaults | fields).items()})


def draws(count: int = 20_000, **fields: object) -> np.ndarray:
    tokens = jax.jit(sample)(jnp.broadcast_to(LOGITS, (count, 5)), how(count, **fields)).token
    return np.bincount(np.asarray(tokens), minlength=5) / count


@pytest.mark.parametrize(
    ("fields", "expect"),
    [
        ({}, [0.4, 0.3, 0.15, 0.1, 0.05]),
        ({"temperature": np.full(20_000, 0.5, np.float32)}, [0.16, 0.09, 0.0225, 0.01, 0.0025]),
        ({"top_k": np.full(20_000, 2, np.int32)}, [0.4, 0.3, 0, 0, 0]),
        ({"top_p": np.full(20_000, 0.75, np.float32)}, [0.4, 0.3, 0.15, 0, 0]),
        ({"top_p": np.full(20_000, 1e-6, np.float32)}, [1, 0, 0, 0, 0]),
        ({"temperature": np.zeros(20_000, np.float32)}, [1, 0, 0, 0, 0]),
        ({"min_p": np.full(20_000, 0.3, np.float32)}, [0.4, 0.3, 0.15, 0, 0]),
        ({"min_p": np.ones(20_000, np.float32)}, [1, 0, 0, 0, 0]),
        # At this temperature 0.3 has (0.3 / 0.4) ** 2 = 0.5625 of the likeliest one's probability, 0.15 has 0.14.
        (
            {"min_p": np.full(20_000, 0.3, np.float32), "temperature": np.full(20_000, 0.5, np.float32)},
            [0.16, 0.09, 0, 0, 0],
        ),
        # Of the three that min_p leaves, 0.4 and 0.3 are 0.82; of all five they would be 0.7.
        ({"min_p": np.full(20_000, 0.3, np.float32), "top_p": np.full(20_000, 0.75, np.float32)}, [0.4, 0.3, 0, 0, 0]),
    ],
)
def test_distribution(fields: dict[str, object], expect: list[float]) -> None:
    """20,000 draws: within 5 standard deviations, and exactly 0 where nothing may be drawn."""
    p = np.array(expect) / np.sum(expect)
    got = draws(**fields)
    assert (np.abs(got - p) <= 5 * np.sqrt(p * (1 - p) / 20_000)).all(), got


@pytest.mark.parametrize("temperature", [1e-5, 1.2e-38, 1e-45])
def test_tiny_temperatures_are_greedy(temperature: float) -> None:
    """The log-probabilities of hundreds of tokens all overflow when they are divided by the smallest float32."""
    logits = jnp.asarray(np.random.default_rng(0).normal(size=(20, 300)), jnp.float32) / 10
    for top_p in (0.9, 1.0):
        fields = how(20, temperature=np.full(20, temperature, np.float32), top_p=np.full(20, top_p, np.float32))
        np.testing.assert_array_equal(jax.jit(sample)(logits, fields).token, logits.argmax(-1))


def test_depends_on_seed_and_position_alone() -> None:
    """Alone or in a batch, first or last, next to any other request; and it does depend on them."""
    rng = np.random.default_rng(0)
    logits = jnp.asarray(rng.normal(size=(6, 300)), jnp.float32)
    seeds = rng.integers(0, 2**32, (6, 2)).astype(np.uint32)
    positions = np.arange(6, dtype=np.int32)
    together = np.asarray(sample(logits, how(6, seed=seeds, position=positions)).token)
    for i in range(6):
        alone = sample(logits[i : i + 1], how(1, seed=seeds[i : i + 1], position=positions[i : i + 1]))
        assert alone.token[0] == together[i]
    flat = jnp.zeros((50, 300))
    assert (
        len(
            set(
                np.asarray(
                    sample(
                        flat, how(50, position=np.arange(50, dtype=np.int32), seed=np.zeros((50, 2), np.uint32))
                    ).token
                )
            )
        )
        > 30
    )
    assert len(set(np.asarray(sample(flat, how(50)).token))) > 30


def test_logprobs_are_the_models_own() -> None:
    got = sample(LOGITS[None], how(1, temperature=np.array([0.3], np.float32), top_k=np.array([1], np.int32)))
    assert got.token[0] == 0
    np.testing.assert_allclose(got.logprob[0], np.log(0.4), rtol=1e-5)
    np.testing.assert_array_equal(got.top_tokens[0], [0, 1, 2, 3, 4])
    assert got.top_logprobs[0, 0] == got.logprob[0], "the same float"
