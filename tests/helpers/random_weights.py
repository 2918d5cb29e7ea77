"""Random weights under Hugging Face names, for models that go through the loader."""

from __future__ import annotations

import zlib

import numpy as np
from numpy.typing import NDArray

from jax_mla_cp.checkpoint import expected_shapes
from jax_mla_cp.config.model import ModelConfig


def random_weights(config: ModelConfig, seed: int, *, mtp: bool = False) -> dict[str, NDArray[np.float32]]:
    """Each tensor depends on the seed and its name alone."""
    return {name: _random(name, shape, seed) for name, shape in expected_shapes(config, mtp=mtp).items()}


def _random(name: str, shape: tuple[int, ...], seed: int) -> NDArray[np.float32]:
    rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
    values = rng.standard_normal(shape, dtype=np.float32)
    if name.endswith("norm.weight"):
        return 1 + 0.1 * values
    if name.endswith("e_score_correction_bias"):
        return 0.1 * values  # the scores are sigmoids: enough to change which experts are chosen
    if "embed_tokens" in name:
        return values
    return values / np.float32(np.sqrt(shape[1]))  # [outputs, inputs]: keeps the variance of what it is applied to
