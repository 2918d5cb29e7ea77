"""The built-in model: small, with a byte-level tokenizer, its weights random from a fixed seed. What it says is noise.

It goes through the same loader as any checkpoint, under Hugging Face names, so its weights do not depend on the mesh.
"""

from __future__ import annotations

import zlib

import numpy as np
import tokenizers
from numpy.typing import NDArray
from tokenizers import decoders, models, pre_tokenizers

from jax_mla_cp.checkpoint import ArraySource, expected_shapes
from jax_mla_cp.config import ModelConfig
from jax_mla_cp.presets import model_config
from jax_mla_cp.tokenizer import Tokenizer

BOS, EOS = 256, 257
_SEED = 20240607


def default_model(*, mtp: bool = False) -> tuple[ModelConfig, ArraySource, Tokenizer]:
    """Config, weights and tokenizer; `mtp`: with the weights of its layer for multi-token prediction."""
    config = model_config("tiny")
    return config, ArraySource(random_weights(config, _SEED, mtp=mtp)), byte_tokenizer()


def random_weights(config: ModelConfig, seed: int, *, mtp: bool = False) -> dict[str, NDArray[np.float32]]:
    """Weights under Hugging Face names; each tensor depends on the seed and its name alone."""
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


def byte_tokenizer() -> Tokenizer:
    """Token i is byte i of the text's UTF-8; a prompt begins with BOS."""
    backend = tokenizers.Tokenizer(models.BPE(vocab=_byte_letters(), merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<|bos|>", "<|eos|>"])
    return Tokenizer(backend, prefix=[BOS])


def _byte_letters() -> dict[str, int]:
    """The printable letter that stands for each byte in byte-level BPE (GPT-2's `bytes_to_unicode`)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}
