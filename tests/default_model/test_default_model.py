"""The built-in model: small enough for the package, the same on every mesh, and it has learned what its card says."""

from __future__ import annotations

import random

import numpy as np
import pytest

import jax_mla_cp as mla
from jax_mla_cp.config.model import ModelConfig
from jax_mla_cp.default_model import DIRECTORY
from jax_mla_cp.eval.passkey import Passkey
from tests.helpers.synthetic import Driver

FILLER = "The file is opened for reading. If it does not exist, an exception is raised.\n"


@pytest.fixture(scope="module")
def drivers() -> dict[str | None, Driver]:
    return {
        mesh: Driver(mla.load(mesh=mesh and mla.make_mesh(mesh))[0], page_size=64, max_model_len=1024)
        for mesh in (None, "tp=2,cp=2")
    }


@pytest.fixture(scope="module")
def tokenizer() -> mla.Tokenizer:
    found = mla.Tokenizer.from_dir(DIRECTORY, ModelConfig.from_dir(DIRECTORY).vocab_size)
    assert found is not None
    return found


def greedy(driver: Driver, prompt: list[int], count: int) -> tuple[list[int], np.ndarray]:
    """Tokens, and the logits that the first of them is from."""
    request = driver.request()
    logits = first = driver.step([(request, prompt)])[0]
    tokens = [int(logits.argmax())]
    while len(tokens) < count:
        logits = driver.step([(request, tokens[-1:])])[0]
        tokens.append(int(logits.argmax()))
    return tokens, first


def test_it_is_small_and_carries_its_card() -> None:
    assert sum(path.stat().st_size for path in DIRECTORY.iterdir() if path.is_file()) < 24e6
    assert "Model card" in (DIRECTORY / "README.md").read_text()
    config = ModelConfig.from_dir(DIRECTORY)
    heads = (config.kv_lora_rank, config.qk_rope_head_dim, config.qk_nope_head_dim, config.v_head_dim)
    assert heads == (512, 64, 128, 128), "FlashAttention-3's"
    assert config.num_mtp_layers == 1 and config.rope.yarn and config.n_group == 4


def test_special_tokens_and_digits(tokenizer: mla.Tokenizer) -> None:
    assert tokenizer.encode("a")[0] == 0
    assert len(tokenizer.encode("48213")) == 1 + 5
    ids = tokenizer.encode_chat([{"role": "user", "content": "Hi"}])
    assert ids[:2] == [0, 2] and ids[-1] == 3 and ids.count(0) == 1
    text = "def f(x):\n    return x ** 2  # héllo 你好 😀\n"
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_finds_a_passkey_wherever_it_is(drivers: dict[str | None, Driver], tokenizer: mla.Tokenizer) -> None:
    rng = random.Random(5)
    for depth in (0, 7, 22):
        key, other = Passkey.random(rng), Passkey.random(rng)
        lines = [FILLER] * 24
        lines[depth] = f"{key.fact()}\n"
        lines[12] = f"{other.fact()}\n"
        prompt = tokenizer.encode("".join(lines) + key.question())
        found, logits = greedy(drivers[None], prompt, 6)
        assert tokenizer.decode(found).strip() == key.key
        sharded, sharded_logits = greedy(drivers["tp=2,cp=2"], prompt, 6)
        assert sharded == found
        np.testing.assert_allclose(sharded_logits, logits, atol=1e-4 * np.abs(logits).max(), rtol=0)


def test_text_goes_on_with_words(drivers: dict[str | None, Driver], tokenizer: mla.Tokenizer) -> None:
    known = set((FILLER + "Return a new list of the items in an iterable").lower().split())
    tokens, _ = greedy(drivers[None], tokenizer.encode("Return the number of"), 24)
    text = tokenizer.decode(tokens)
    assert text.isascii() and sum(c.isalpha() or c.isspace() for c in text) > 0.7 * len(text)
    assert "pass key" not in text
    assert known & set(text.lower().split())
