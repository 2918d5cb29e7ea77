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
from collections.abc import Callable, Sequence
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
    return measure_in_turn([call], samples=samples)[0]


def measure_in_turn(calls: Sequence[Callable[[], Any]], *, samples: int = 10) -> list[Timing]:
    """Times several programs that are to be compared: a sample of each, then the next of each, from another one on.

    A GPU under load lowers its clocks from second to second, by more than the programs may differ.
    """
    counts = [_calls_per_sample(call) for call in calls]
    times: list[list[float]] = [[] for _ in calls]
    for done in range(samples):
        spent = sum(map(sum, times))
        if done >= _FEWEST_SAMPLES and spent >= _ENOUGH_SECONDS * len(calls):
            break
        for i in range(len(calls)):
            turn = (i + done) % len(calls)
            times[turn].append(_sample(calls[turn], counts[turn]))
    return [_timing(count, taken) for count, taken in zip(counts, times, strict=True)]


def _calls_per_sample(call: Callable[[], Any]) -> int:
    jax.block_until_ready(call())
    calls = 1
    while (taken := _sample(call, calls)) < _SAMPLE_SECONDS and calls < _MOST_CALLS:
        calls = min(_MOST_CALLS, max(calls + 1, math.ceil(1.2 * calls * _SAMPLE_SECONDS / taken)))
    return calls


def _timing(calls: int, times: list[float]) -> Timing:
    median = statistics.median(times)
    return Timing(median / calls, len(times), calls, (max(times) - min(times)) / median)


def _sample(call: Callable[[], Any], calls: int) -> float:
    started = time.perf_counter()
    out: Any = None
    for _ in range(calls):
        out = call()
    jax.block_until_ready(out)
    return time.perf_counter() - started
