"""Questions of every kind for a server, and whether two servers answer them alike."""

from __future__ import annotations

import dataclasses
import functools
import random
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx

from tests.helpers.soak_requests import TIE, TIMEOUT, prompt

MODEL = "jax-mla-cp-tiny"
Body = dict[str, Any]

SCHEMA = {
    "type": "json_schema",
    "json_schema": {
        "name": "point",
        "schema": {
            "type": "object",
            "properties": {"x": {"type": "integer"}, "on": {"type": "boolean"}},
            "required": ["x", "on"],
            "additionalProperties": False,
        },
    },
}
ADJUSTMENTS: tuple[Body, ...] = (
    {"logit_bias": {str(i): 8 for i in range(300, 340)}},
    {"presence_penalty": 1.5, "frequency_penalty": 0.5},
    {"repetition_penalty": 1.3},
    {"response_format": SCHEMA},
)


@dataclasses.dataclass(frozen=True)
class Answer:
    """A choice of a completion."""

    text: str
    tokens: list[str]
    logprobs: list[float | None]
    gaps: list[float]
    """Between the two best log-probabilities, of each token."""
    cached: int
    """Prompt tokens that were not computed."""


@dataclasses.dataclass(frozen=True)
class Sheet:
    """Questions of one kind."""

    name: str
    bodies: list[Body]
    at_a_time: int = 1
    """If several, steps hold several of them."""
    first_alone: bool = False
    """The others reuse what it leaves in the cache."""


def sheets(count: int, tokens: int, chunk: int, longest: int, at_a_time: int = 1) -> list[Sheet]:
    """Questions of each kind.

    Args:
      count: about as many of each kind.
      tokens: of each answer.
      chunk: tokens of a prompt that the server prefills in a step.
      longest: tokens of a prompt that it has room for.
      at_a_time: as many are asked at once also where they need not be.
    """
    rng = random.Random(13)

    def bodies(low: int, high: int, count: int = count, **more: Any) -> list[Body]:
        lengths = [low + (high - low) * i // max(1, count - 1) for i in range(count)]
        return [{"prompt": prompt(length, rng), "max_tokens": tokens, **more} for length in lengths]

    shared = prompt(longest // 2, rng)
    tails = [prompt(1 + 3 * i, rng) for i in range(count)]
    adjusted = bodies(3, chunk // 2, -(-count // len(ADJUSTMENTS)) * len(ADJUSTMENTS))
    scored = bodies(2, min(longest, 3 * chunk), echo=True) + bodies(2, chunk, prompt_logprobs=2)
    return [
        Sheet("prefill", bodies(1, chunk), at_a_time),
        Sheet("chunked prefill", bodies(chunk + 1, longest), at_a_time),
        Sheet("mixed steps", bodies(2, longest), max(4, at_a_time)),
        Sheet("prefix reuse", [{"prompt": shared + tail, "max_tokens": tokens} for tail in tails], at_a_time, True),
        Sheet("adjustments", [body | ADJUSTMENTS[i % len(ADJUSTMENTS)] for i, body in enumerate(adjusted)], at_a_time),
        Sheet("adjustments in a step", [adjusted[0] | change for change in ADJUSTMENTS], len(ADJUSTMENTS)),
        Sheet("prompt log-probabilities", scored, at_a_time),
    ]


def fill(url: str, questions: Sequence[Sheet]) -> dict[str, list[Answer]]:
    """A server's answers, by the sheet's name."""
    found: dict[str, list[Answer]] = {}
    for sheet in questions:
        alone = sheet.bodies[:1] if sheet.first_alone else []
        with ThreadPoolExecutor(sheet.at_a_time) as pool:
            found[sheet.name] = [_ask(url, body) for body in alone]
            found[sheet.name] += pool.map(functools.partial(_ask, url), sheet.bodies[len(alone) :])
    return found


def _ask(url: str, body: Body) -> Answer:
    plain = {"model": MODEL, "temperature": 0, "logprobs": 2, "ignore_eos": "response_format" not in body}
    answer = httpx.post(f"{url}/v1/completions", json=plain | body, timeout=TIMEOUT)
    assert answer.status_code == 200, answer.text
    read = answer.json()
    choice = read["choices"][0]
    logprobs = choice["logprobs"]
    numbers: list[float | None] = list(logprobs["token_logprobs"])
    for place in choice.get("prompt_logprobs") or []:
        numbers += [value["logprob"] for value in (place or {}).values()]
    best = [sorted((top or {}).values(), reverse=True) for top in logprobs["top_logprobs"]]
    gaps = [two[0] - two[1] if len(two) > 1 else 0.0 for two in best]
    cached = (read["usage"].get("prompt_tokens_details") or {}).get("cached_tokens") or 0
    return Answer(choice["text"], logprobs["tokens"], numbers, gaps, cached)


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Comparison of two servers' answers to a sheet."""

    wrong: list[str]
    """Differences that are none of rounding."""
    ties: int
    """Answers whose tokens differ from a place on where two are as likely."""
    furthest: float
    """Largest difference of two log-probabilities of the same token."""


def compare(one: Sequence[Answer], other: Sequence[Answer]) -> Comparison:
    assert len(one) == len(other)
    wrong, ties, furthest = [], 0, 0.0
    for i, (a, b) in enumerate(zip(one, other, strict=True)):
        same = next((j for j, (x, y) in enumerate(zip(a.tokens, b.tokens, strict=False)) if x != y), None)
        if same is not None and min(a.gaps[same], b.gaps[same]) >= TIE:
            wrong.append(f"question {i}, token {same}: {a.tokens[same]!r} and {b.tokens[same]!r}")
        elif same is not None:
            ties += 1
        elif (a.text, len(a.logprobs)) != (b.text, len(b.logprobs)):
            wrong.append(f"question {i}: {a.text!r} and {b.text!r}")
        for x, y in zip(a.logprobs[:same], b.logprobs[:same], strict=True):
            if (x is None) != (y is None):
                wrong.append(f"question {i}: log-probabilities {x} and {y}")
            elif x is not None and y is not None:
                furthest = max(furthest, abs(x - y))
    return Comparison(wrong, ties, furthest)
