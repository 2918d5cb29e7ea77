"""Passkeys that the built-in model finds, asked of a running server."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import httpx

from jax_mla_cp.config.model import ModelConfig
from jax_mla_cp.default_model import DIRECTORY
from jax_mla_cp.default_model.heldout import heldout_text
from jax_mla_cp.eval.corpus import Corpus, PasskeyPrompt
from jax_mla_cp.tokenizer import Tokenizer, require_tokenizer

_LENGTHS = (100, 777, 2100, 5000)


def prompts() -> list[PasskeyPrompt]:
    """Two for each of several lengths."""
    tokenizer = require_tokenizer(Tokenizer.from_dir(DIRECTORY, ModelConfig.from_dir(DIRECTORY).vocab_size))
    text = Corpus(tokenizer, heldout_text())
    return [text.prompt(length, depth, seed=0) for length in _LENGTHS for depth in (0.1, 0.9)]


def ask(url: str, asked: list[PasskeyPrompt], model: str = "jax-mla-cp-tiny") -> list[str]:
    """A server's greedy answers, all prompts at the same time.

    Args:
      url: without /v1.
    """

    def answer(prompt: PasskeyPrompt) -> str:
        body = {"model": model, "prompt": prompt.tokens, "max_tokens": 8, "temperature": 0}
        got = httpx.post(f"{url}/v1/completions", json=body, timeout=300)
        assert got.status_code == 200, got.text
        return str(got.json()["choices"][0]["text"])

    with ThreadPoolExecutor(len(asked)) as pool:
        return list(pool.map(answer, asked))


def missed(asked: list[PasskeyPrompt], answers: list[str]) -> list[tuple[int, float, str]]:
    """Length, depth and answer of each prompt whose key was not found."""
    return [(p.length, p.depth, a) for p, a in zip(asked, answers, strict=True) if not p.is_answered_by(a)]
