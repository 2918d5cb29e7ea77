"""A tokenized text, cut into passkey prompts of exact lengths and into windows for perplexity.

A prompt depends on the text, the tokenizer, the seed, its length and its depth alone: it is the same on every mesh, whatever
other prompts a run has.
"""

from __future__ import annotations

import dataclasses
import random
import re

import numpy as np

from jax_mla_cp.config.errors import ConfigError
from jax_mla_cp.eval.passkey import Passkey
from jax_mla_cp.tokenizer import Tokenizer

_MAX_SHIFT = 32
"""Tokens by which a cut may move to fall between two lines."""
WINDOW = 2048
"""Maximum number of tokens in a window."""


@dataclasses.dataclass(frozen=True)
class PasskeyPrompt:
    """A long text with a passkey in it and the question for it at the end. The key is the expected continuation."""

    length: int
    """Number of tokens, with those that begin every prompt."""
    depth: float
    """Position of the passkey: 0 at the text's start, 1 just before the question."""
    passkey: Passkey
    tokens: list[int]

    def is_answered_by(self, completion: str) -> bool:
        """True if the completion's first run of digits is the key."""
        number = re.search(r"[0-9]+", completion)
        return number is not None and number[0] == self.passkey.key


class Corpus:
    """A tokenized text that prompts and windows are cut from."""

    def __init__(self, tokenizer: Tokenizer, text: str):
        self._tokenizer = tokenizer
        self._tokens = self._encode(text)
        ends_line = {token: tokenizer.decode([token]).endswith("\n") for token in set(self._tokens)}
        self._line_starts = 1 + np.flatnonzero([ends_line[token] for token in self._tokens])

    def prompt(self, length: int, depth: float, seed: int) -> PasskeyPrompt:
        """Makes a prompt of `length` tokens: text, the passkey on a line of its own, text, the question.

        The text starts, and is cut for the passkey, between two lines where there is such a place nearby.

        Raises:
          ConfigError: `length` is too short for passkey and question, or the text is too short.
        """
        rng = random.Random(f"{seed} {length} {depth:.6f}")
        passkey = Passkey.random(rng)
        fact, question = self._encode(f"\n{passkey.fact()}\n"), self._encode(f"\n{passkey.question()}")
        overhead = len(self._tokenizer.prefix) + len(fact) + len(question)
        filler = length - overhead
        if filler < 0:
            raise ConfigError("lengths", f"fact and question take {overhead} tokens, got {length}. Use longer prompts.")
        self._check_long_enough("lengths", length, filler)
        last = len(self._tokens) - filler
        start = self._between_lines(rng.randint(0, last), 0, last)
        cut = self._between_lines(start + round(depth * filler), start, start + filler)
        tokens = [
            *self._tokenizer.prefix,
            *self._tokens[start:cut],
            *fact,
            *self._tokens[cut : start + filler],
            *question,
        ]
        return PasskeyPrompt(length, depth, passkey, tokens)

    def windows(self, tokens: int, longest: int) -> list[list[int]]:
        """Cuts windows of `tokens` tokens in total, spread evenly over the text. Each begins as a prompt does.

        Args:
          longest: the model's maximum; windows are no longer than this, nor than `WINDOW`.

        Returns: token ids of each window, all lengths the same or one apart.

        Raises:
          ConfigError: the text is too short.
        """
        self._check_long_enough("perplexity_tokens", tokens, tokens)
        begin = self._tokenizer.prefix
        count = -(-tokens // min(WINDOW, longest))
        sizes = [tokens // count + (i < tokens % count) for i in range(count)]
        starts = [i * len(self._tokens) // count for i in range(count)]
        return [
            [*begin, *self._tokens[start : start + size - len(begin)]]
            for start, size in zip(starts, sizes, strict=True)
        ]

    def _encode(self, text: str) -> list[int]:
        """Token ids, without those that begin and end every text."""
        ids = self._tokenizer.encode(text)
        return ids[len(self._tokenizer.prefix) : len(ids) - len(self._tokenizer.suffix)]

    def _between_lines(self, at: int, low: int, high: int) -> int:
        """The line start nearest to `at`, or one of the bounds, within `_MAX_SHIFT`; else `at`."""
        near = self._line_starts[np.searchsorted(self._line_starts, max(low, at - _MAX_SHIFT)) :]
        places = [int(p) for p in near[: np.searchsorted(near, min(high, at + _MAX_SHIFT), side="right")]]
        places += [bound for bound in (low, high) if abs(bound - at) <= _MAX_SHIFT]
        return min(places, key=lambda place: abs(place - at), default=at)

    def _check_long_enough(self, field: str, value: int, tokens: int) -> None:
        if tokens > len(self._tokens):
            raise ConfigError(
                field,
                f"{value} needs a text of {tokens} tokens, it has {len(self._tokens)}. Use less, or a longer `text`.",
            )


def even_depths(count: int) -> list[float]:
    """Returns `count` evenly spaced depths from 0 to 1.

    >>> even_depths(5)
    [0.0, 0.25, 0.5, 0.75, 1.0]
    """
    return [i / (count - 1) for i in range(count)]
