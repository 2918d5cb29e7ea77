"""From a text to prompts of an exact number of tokens, each with a passkey in it, and to windows for the perplexity.

A prompt follows from the text, the tokenizer, the seed, its length and its depth alone: it is the same on every mesh, and
whatever else is asked in the run.
"""

from __future__ import annotations

import dataclasses
import random
import re

import numpy as np

from jax_mla_cp.config.errors import ConfigError
from jax_mla_cp.eval.passkey import Passkey
from jax_mla_cp.tokenizer import Tokenizer

_NEAR = 32
"""How many tokens a cut may be moved so that it falls between two lines."""
WINDOW = 2048
"""Most tokens of a window."""


@dataclasses.dataclass(frozen=True)
class Prompt:
    """A question about a fact in a long text; the passkey's key is what should follow."""

    length: int
    """Tokens, those that begin every prompt included."""
    depth: float
    """Where the fact is: 0 at the text's start, 1 just before the question."""
    passkey: Passkey
    tokens: list[int]

    def is_answered_by(self, completion: str) -> bool:
        """Whether the first run of digits is the key."""
        number = re.search(r"[0-9]+", completion)
        return number is not None and number[0] == self.passkey.key


class Text:
    """A text in tokens, to be cut into prompts and windows."""

    def __init__(self, tokenizer: Tokenizer, text: str):
        self._tokenizer = tokenizer
        self._tokens = self._encode(text)
        ends_line = {token: tokenizer.decode([token]).endswith("\n") for token in set(self._tokens)}
        self._line_starts = 1 + np.flatnonzero([ends_line[token] for token in self._tokens])

    def prompt(self, length: int, depth: float, seed: int) -> Prompt:
        """`length` tokens: text, the fact on a line of its own, text, the question.

        Text begins, and gives way to the fact, between two lines where there is such a place nearby.

        Raises:
          ConfigError: no room for fact and question, or the text is too short.
        """
        rng = random.Random(f"{seed} {length} {depth:.6f}")
        passkey = Passkey.random(rng)
        fact, question = self._encode(f"\n{passkey.fact()}\n"), self._encode(f"\n{passkey.question()}")
        least = len(self._tokenizer.prefix) + len(fact) + len(question)
        room = length - least
        if room < 0:
            raise ConfigError("lengths", f"fact and question take {least} tokens, got {length}. Use longer prompts.")
        self._check_holds("lengths", length, room)
        last = len(self._tokens) - room
        start = self._between_lines(rng.randint(0, last), 0, last)
        cut = self._between_lines(start + round(depth * room), start, start + room)
        tokens = [
            *self._tokenizer.prefix,
            *self._tokens[start:cut],
            *fact,
            *self._tokens[cut : start + room],
            *question,
        ]
        return Prompt(length, depth, passkey, tokens)

    def windows(self, tokens: int, longest: int) -> list[list[int]]:
        """`tokens` in all, in equal windows of at most `WINDOW` and `longest`, evenly spread over the text; each begins as
        a prompt does.

        Raises:
          ConfigError: the text is too short.
        """
        self._check_holds("perplexity_tokens", tokens, tokens)
        begin = self._tokenizer.prefix
        count = -(-tokens // min(WINDOW, longest))
        sizes = [tokens // count + (i < tokens % count) for i in range(count)]
        starts = [i * len(self._tokens) // count for i in range(count)]
        return [
            [*begin, *self._tokens[start : start + size - len(begin)]]
            for start, size in zip(starts, sizes, strict=True)
        ]

    def _encode(self, text: str) -> list[int]:
        """Without what begins and ends every text."""
        ids = self._tokenizer.encode(text)
        return ids[len(self._tokenizer.prefix) : len(ids) - len(self._tokenizer.suffix)]

    def _between_lines(self, at: int, low: int, high: int) -> int:
        """The place next to `at` where a line starts, if one is near; the bounds will do too."""
        near = self._line_starts[np.searchsorted(self._line_starts, max(low, at - _NEAR)) :]
        places = [int(p) for p in near[: np.searchsorted(near, min(high, at + _NEAR), side="right")]]
        places += [bound for bound in (low, high) if abs(bound - at) <= _NEAR]
        return min(places, key=lambda place: abs(place - at), default=at)

    def _check_holds(self, field: str, value: int, tokens: int) -> None:
        if tokens > len(self._tokens):
            raise ConfigError(
                field,
                f"{value} needs a text of {tokens} tokens, it has {len(self._tokens)}. Use less, or a longer `text`.",
            )


def even_depths(count: int) -> list[float]:
    """`count` depths from 0 to 1.

    >>> even_depths(5)
    [0.0, 0.25, 0.5, 0.75, 1.0]
    """
    return [i / (count - 1) for i in range(count)]
