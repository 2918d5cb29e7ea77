"""The workload: times, lengths and prompts of all requests, which follow from the seed before the first is sent."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

from jax_mla_cp.config.errors import ConfigError

_RANDOM_HEAD = 4
"""Random tokens at a prompt's start, so that no two prompts share a prefix by chance."""


@dataclasses.dataclass(frozen=True)
class Lengths:
    """A distribution of token counts: uniform from `low` to `high`, or with `sigma` log-normal around `median`, truncated to
    `low` to `high`."""

    low: int
    high: int
    median: float = 0.0
    sigma: float = 0.0

    @classmethod
    def parse(cls, field: str, text: str) -> Lengths:
        """Parses N, LOW-HIGH or lognormal:MEDIAN:SIGMA:MAX.

        Raises:
          ConfigError: it is none of these.
        """
        name, *numbers = text.split(":")
        try:
            if name == "lognormal":
                median, sigma, high = numbers
                found = cls(1, int(high), float(median), float(sigma))
                valid = 1 <= found.median <= found.high and 0 < found.sigma <= 4
            else:
                low, _, high = text.partition("-")
                found = cls(int(low), int(high or low))
                valid = True
        except ValueError:
            valid = False
        if not (valid and 1 <= found.low <= found.high <= 1 << 24):
            raise ConfigError(
                field,
                f"must be N, LOW-HIGH or lognormal:MEDIAN:SIGMA:MAX, from 1 token to 16M, with a sigma above 0 and at most "
                f"4, got {text!r}. Use e.g. 512, 100-2000 or lognormal:512:0.8:4096.",
            )
        return found

    def draw(self, count: int, rng: np.random.Generator) -> list[int]:
        """Draws `count` lengths."""
        if not self.sigma:
            return [int(n) for n in rng.integers(self.low, self.high, size=count, endpoint=True)]
        lengths: list[int] = []
        while len(lengths) < count:
            n = round(rng.lognormal(math.log(self.median), self.sigma))
            if self.low <= n <= self.high:
                lengths.append(n)
        return lengths


@dataclasses.dataclass(frozen=True)
class SharedPrefix:
    """Prefixes that prompts share: each prompt starts with one of `groups` texts of `tokens` tokens."""

    tokens: int
    groups: int

    @classmethod
    def parse(cls, text: str) -> SharedPrefix:
        """Parses TOKENS:GROUPS.

        Raises:
          ConfigError: it is something else.
        """
        try:
            tokens, groups = (int(part) for part in text.split(":"))
        except ValueError:
            tokens = groups = 0
        if not (1 <= tokens <= 1 << 24 and 1 <= groups <= 1 << 16):
            raise ConfigError(
                "shared_prefix", f"must be TOKENS:GROUPS, each at least 1, got {text!r}. Use e.g. 1000:8."
            )
        return cls(tokens, groups)


@dataclasses.dataclass(frozen=True)
class PlannedRequest:
    """A request before it is sent."""

    at: float
    """Time to send it, in seconds after the start."""
    prompt: list[int] | str
    prompt_tokens: int
    """The planned number. The server may count others in a prompt made of words."""
    output_tokens: int
    group: int | None
    """The shared prefix it starts with; None: there are none."""


def arrivals(count: int, rate: float, burstiness: float, rng: np.random.Generator) -> list[float]:
    """Draws arrival times, in seconds after the start; the first is 0.

    Gaps are gamma-distributed with mean `1 / rate` and shape `burstiness`: 1 is a Poisson process, smaller is burstier,
    larger is more even. With an infinite rate all requests arrive at once.
    """
    if math.isinf(rate):
        return [0.0] * count
    gaps = rng.gamma(burstiness, 1 / (rate * burstiness), size=count)
    gaps[0] = 0.0
    return [float(at) for at in np.cumsum(gaps)]


def plan(
    pool: Sequence[int] | Sequence[str],
    *,
    requests: int,
    rate: float,
    burstiness: float,
    prompt_tokens: Lengths,
    output_tokens: Lengths,
    shared_prefix: SharedPrefix | None,
    seed: int,
) -> list[PlannedRequest]:
    """Plans the requests of a run, in the order of their times.

    Args:
      pool: the text that prompts are cut from: token ids, or words if the server has no /tokenize.
      rate: requests per second, may be infinite.

    Times, lengths and contents have a random stream each, so that another rate sends the same prompts.
    """
    times, lengths, contents = (np.random.default_rng(s) for s in np.random.SeedSequence(seed).spawn(3))
    ats = arrivals(requests, rate, burstiness, times)
    prompts, outputs = prompt_tokens.draw(requests, lengths), output_tokens.draw(requests, lengths)
    prefix = shared_prefix or SharedPrefix(0, 1)
    prefixes = [_cut(pool, prefix.tokens, contents) for _ in range(prefix.groups)]
    planned = []
    for at, own, output in zip(ats, prompts, outputs, strict=True):
        group = int(contents.integers(prefix.groups))
        parts = [*prefixes[group], *_cut(pool, own, contents)]
        prompt = " ".join(map(str, parts)) if isinstance(pool[0], str) else [int(part) for part in parts]
        planned.append(PlannedRequest(at, prompt, len(parts), output, group if shared_prefix else None))
    return planned


def _cut(pool: Sequence[int] | Sequence[str], count: int, rng: np.random.Generator) -> list[int | str]:
    """`count` tokens: a few random ones, then the text from a random place on, wrapping around at its end."""
    head = [pool[i] for i in rng.integers(len(pool), size=min(count, _RANDOM_HEAD))]
    start = int(rng.integers(len(pool)))
    return [*head, *(pool[(start + i) % len(pool)] for i in range(count - len(head)))]
