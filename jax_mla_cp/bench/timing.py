"""Device time of a program, without the gaps of dispatch.

A sample enqueues the program several times back to back and waits once, so that the host prepares a call while the device
runs the one before; its time is divided by the number of calls. There are so many calls that a sample takes at least 20 ms.
The median of 10 samples counts; programs whose samples take long are sampled less (`n` in the tables), 3 times at least.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax

_SAMPLE_SECONDS = 0.02
_ENOUGH_SECONDS = 1.0  # of samples together, once there are three
_FEWEST_SAMPLES = 3
_MOST_CALLS = 1000


@dataclasses.dataclass(frozen=True)
class Timing:
    """The median of `samples` samples, in seconds per call."""

    seconds: float
    samples: int
    calls: int
    """Calls in a sample."""
    spread: float
    """(slowest - fastest sample) / median."""

    def row(self) -> dict[str, Any]:
        """What a table's row says of it."""
        return {"ms": self.seconds * 1e3, "n": self.samples, "calls": self.calls, "spread": self.spread}


def measure(call: Callable[[], Any], *, samples: int = 10) -> Timing:
    """Times `call`, which enqueues a program and returns its results. The first call, which may compile, does not count."""
    jax.block_until_ready(call())
    calls = 1
    while (taken := _sample(call, calls)) < _SAMPLE_SECONDS and calls < _MOST_CALLS:
        calls = min(_MOST_CALLS, max(calls + 1, math.ceil(1.2 * calls * _SAMPLE_SECONDS / taken)))
    times: list[float] = []
    while len(times) < samples and (len(times) < _FEWEST_SAMPLES or sum(times) < _ENOUGH_SECONDS):
        times.append(_sample(call, calls))
    median = statistics.median(times)
    return Timing(median / calls, len(times), calls, (max(times) - min(times)) / median)


def _sample(call: Callable[[], Any], calls: int) -> float:
    started = time.perf_counter()
    out: Any = None
    for _ in range(calls):
        out = call()
    jax.block_until_ready(out)
    return time.perf_counter() - started
