"""Greedy requests, and whether two answers are the same but for ties."""

from __future__ import annotations

import dataclasses
import functools
import json
import random
import time
from typing import Any

import httpx

from jax_mla_cp.config.model import ModelConfig
from jax_mla_cp.default_model import DIRECTORY
from jax_mla_cp.default_model.heldout import heldout_text
from jax_mla_cp.tokenizer import Tokenizer, require_tokenizer
from tests.helpers.live import Live

TIE = 1e-4
"""Log-probabilities that are nearer than this may change places with the batch: float32 is added in another order."""
TIMEOUT = 600.0


@functools.cache
def text_tokens() -> list[int]:
    tokenizer = require_tokenizer(Tokenizer.from_dir(DIRECTORY, ModelConfig.from_dir(DIRECTORY).vocab_size))
    return tokenizer.encode(heldout_text()[:200_000])


def prompt(length: int, rng: random.Random) -> list[int]:
    """Text from a random place on; its first tokens are random, so that it shares no prefix by chance."""
    tokens = text_tokens()
    start = rng.randrange(len(tokens) - length)
    head = rng.sample(tokens, min(4, length))
    return [*head, *tokens[start : start + length - len(head)]]


@dataclasses.dataclass(frozen=True)
class Answer:
    tokens: list[str]
    gaps: list[float]
    """Between the two best log-probabilities, of each token."""
    usage: dict[str, Any]

    @property
    def cached(self) -> int:
        """Prompt tokens that were not computed."""
        return int((self.usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0)


def body(live: Live, prompt: list[int], max_tokens: int, **more: Any) -> dict[str, Any]:
    return {
        "model": live.model,
        "prompt": prompt,
        "max_tokens": max_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "logprobs": 2,
        **more,
    }


def read(answer: httpx.Response) -> Answer:
    assert answer.status_code == 200, answer.text
    found = answer.json()
    logprobs = found["choices"][0]["logprobs"]
    best = [sorted(top.values(), reverse=True) for top in logprobs["top_logprobs"]]
    return Answer(logprobs["tokens"], [two[0] - two[1] for two in best], found["usage"])


async def ask(client: httpx.AsyncClient, live: Live, prompt: list[int], max_tokens: int, **more: Any) -> Answer:
    answer = await client.post(f"{live.url}/v1/completions", json=body(live, prompt, max_tokens, **more))
    return read(answer)


def ask_alone(live: Live, prompt: list[int], max_tokens: int, **more: Any) -> Answer:
    return read(httpx.post(f"{live.url}/v1/completions", json=body(live, prompt, max_tokens, **more), timeout=TIMEOUT))


def differ(one: Answer, other: Answer) -> str | None:
    """The place where two answers differ other than by a tie, after which nothing can be compared; None: nowhere."""
    for i, (a, b) in enumerate(zip(one.tokens, other.tokens, strict=False)):
        if a != b:
            return (
                None if min(one.gaps[i], other.gaps[i]) < TIE else f"token {i}: {a!r} and {b!r}, gap {one.gaps[i]:.2g}"
            )
    return None if len(one.tokens) == len(other.tokens) else f"{len(one.tokens)} and {len(other.tokens)} tokens"


async def stream(client: httpx.AsyncClient, live: Live, prompt: list[int], max_tokens: int) -> list[tuple[float, str]]:
    """(time, text) of each token of a streamed answer, whose stream must end as it should."""
    request = body(live, prompt, max_tokens, stream=True)
    moments, reason = [], None
    async with client.stream("POST", f"{live.url}/v1/completions", json=request) as answer:
        assert answer.status_code == 200, await answer.aread()
        async for line in answer.aiter_lines():
            if line.startswith("data: {"):
                event = json.loads(line[6:])
                assert "error" not in event, event
                choice = event["choices"][0]
                reason = choice["finish_reason"] or reason
                if choice["logprobs"] and choice["logprobs"]["tokens"]:
                    moments += [(time.perf_counter(), token) for token in choice["logprobs"]["tokens"]]
    assert reason == "length" and len(moments) == max_tokens, (reason, len(moments))
    return moments
