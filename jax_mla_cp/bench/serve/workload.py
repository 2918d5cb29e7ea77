"""What is sent and when: all of it follows from the seed, before the first request is sent."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

from jax_mla_cp.config.errors import ConfigError

_HEAD = 4
"""Random tokens that a prompt starts with: no two prompts share a prefix that nobody asked for."""


@dataclasses.dataclass(frozen=True)
class Lengths:
    """A distribution of token counts: uniform from `low` to `high`, or with `sigma` log-normal around `median`, where what
    is outside of `low` and `high` is drawn again."""

    low: int
    high: int
    median: float = 0.0
    sigma: float = 0.0

    @classmethod
    def parse(cls, field: str, text: str) -> Lengths:
        """N, LOW-HIGH or lognormal:MEDIAN:SIGMA:MOST.

        Raises:
          ConfigError: it is none of these.
        """
        name, *numbers = text.split(":")
        try:
            if name == "lognormal":
                median, sigma, most = numbers
                found = cls(1, int(most), float(median), float(sigma))
                good = 1 <= found.median <= found.high and 0 < found.sigma <= 4
            else:
                low, _, high = text.partition("-")
                found = cls(int(low), int(high or low))
                good = True
        except ValueError:
            good = False
        if not (good and 1 <= found.low <= found.high <= 1 << 24):
            raise ConfigError(
                field,
                f"must be N, LOW-HIGH or lognormal:MEDIAN:SIGMA:MOST, from 1 token to 16M, with a sigma above 0 and at most "
                f"4, got {text!r}. Use e.g. 512, 100-2000 or lognormal:512:0.8:4096.",
            )
        return found

    def draw(self, count: int, rng: np.random.Generator) -> list[int]:
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
    """Each request's prompt starts with one of `groups` texts of `tokens` tokens, before its own tokens."""

    tokens: int
    groups: int

    @classmethod
    def parse(cls, text: str) -> SharedPrefix:
        """TOKENS:GROUPS.

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
class Planned:
    """One request, before it is sent."""

    at: float
    """Seconds after the start at which it is to be sent."""
    prompt: list[int] | str
    prompt_tokens: int
    """Meant; of a prompt in words the server's tokenizer may count others."""
    output_tokens: int
    group: int | None
    """Of the shared prefix."""


def arrivals(count: int, rate: float, burstiness: float, rng: np.random.Generator) -> list[float]:
    """Seconds after the start, the first 0. Gaps are gamma-distributed with mean `1 / rate` and shape `burstiness`: 1 is a
    Poisson process, less comes in bursts, more comes evenly. An infinite rate sends everything at once."""
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
) -> list[Planned]:
    """The requests of a run, in the order of their times.

    Args:
      pool: a text that prompts are cut from: token ids, or words where the server tells no ids.
      rate: requests per second, may be infinite.

    Times, lengths and contents have a random stream each: another rate sends the same prompts.
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
        planned.append(Planned(at, prompt, len(parts), output, group if shared_prefix else None))
    return planned


def _cut(pool: Sequence[int] | Sequence[str], count: int, rng: np.random.Generator) -> list[int | str]:
    """So many tokens of the text from a random place on, going round at its end, after a few random ones."""
    head = [pool[i] for i in rng.integers(len(pool), size=min(count, _HEAD))]
    start = int(rng.integers(len(pool)))
    return [*head, *(pool[(start + i) % len(pool)] for i in range(count - len(head)))]
