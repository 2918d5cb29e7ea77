"""The measurements, of whatever engine: the time to the first token, and the time of a decode step."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np


class TargetFailed(RuntimeError):
    """A request failed, or was answered with another number of tokens. The message is for the user."""


class Target(Protocol):
    """An engine that is measured."""

    def metadata(self) -> dict[str, Any]:
        """Entries for the JSON file: at least `engine` and `model`."""
        ...

    def run(self, prompts: Sequence[list[int]], output_tokens: int) -> float:
        """Sends all prompts at once, each of which generates `output_tokens` tokens greedily, none ending sooner.

        Returns:
          Seconds until the last one has ended.

        Raises:
          TargetFailed: a request failed.
        """
        ...


@dataclasses.dataclass
class Work:
    """The measurements of one target.

    Every run has new prompts of random tokens, so that no cached prefix shortens it.

    Args:
      vocabulary: tokens are drawn from 10 to this: the first ones are often special.
      generate: tokens of the short and of the long runs whose difference is decode steps alone.
      samples: runs of each kind; medians count.
    """

    target: Target
    vocabulary: int
    generate: tuple[int, int]
    samples: int
    seed: int = 0

    def __post_init__(self) -> None:
        self._rng = np.random.default_rng(self.seed)

    def time_to_first_token(self, tokens: int) -> dict[str, Any]:
        """One request with one token of output; the first run, which may compile, does not count."""
        times = self._times(1, tokens, 1, 1 + self.samples)[1:]
        return {"what": "time to first token", "requests": 1, "context": tokens, "ms": statistics.median(times) * 1e3}

    def decode_step(self, requests: int, context: int) -> dict[str, Any]:
        """The difference between long and short runs, divided by their steps: prefill and the host's begin and end cancel."""
        few, many = self.generate
        self._times(requests, context, few, 1)
        short, long = (self._times(requests, context, count, self.samples) for count in (few, many))
        step = (statistics.median(long) - statistics.median(short)) / (many - few)
        return {
            "what": "decode step",
            "requests": requests,
            "context": context,
            "ms": step * 1e3,
            "tokens_per_s": requests / step if step > 0 else None,
            "spread_ms": (max(long) - min(long) + max(short) - min(short)) / (many - few) * 1e3,
        }

    def _times(self, requests: int, tokens: int, output_tokens: int, count: int) -> list[float]:
        return [self.target.run(self._prompts(requests, tokens), output_tokens) for _ in range(count)]

    def _prompts(self, requests: int, tokens: int) -> list[list[int]]:
        prompts: list[list[int]] = self._rng.integers(10, self.vocabulary, (requests, tokens)).tolist()
        return prompts
