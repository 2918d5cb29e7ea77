"""Device time of a program, without dispatch gaps.

A sample enqueues the program several times back to back and waits once, so that the host prepares a call while the device
runs the previous one. A sample has enough calls to take 20 ms; its time is divided by their number. The median of 10 samples
is reported; slow programs get fewer samples (`n` in the tables), at least 3.

The numbers of calls and samples follow from the times. Processes that run a program together must agree on these, or their
collectives would not meet: `Agree` gives all of them the same time of each sample.
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
_ENOUGH_SECONDS = 1.0  # sampling stops once all samples took this, and there are `_MIN_SAMPLES`
_MIN_SAMPLES = 3
_MAX_CALLS = 1000

Agree = Callable[[float], float]
"""From this process's time of a sample to the one that counts in all processes."""


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
        """Columns of a table's row."""
        return {"ms": self.seconds * 1e3, "n": self.samples, "calls": self.calls, "spread": self.spread}


def alone(seconds: float) -> float:
    """The `Agree` of a program that no other process runs."""
    return seconds


def measure(call: Callable[[], Any], *, samples: int = 10, agree: Agree = alone) -> Timing:
    """Times `call`, which enqueues a program and returns its results. The first call, which may compile, does not count."""
    return measure_in_turn([call], samples=samples, agree=agree)[0]


def measure_in_turn(calls: Sequence[Callable[[], Any]], *, samples: int = 10, agree: Agree = alone) -> list[Timing]:
    """Times several programs to compare: one sample of each in turn, starting each round with another program.

    A GPU under load changes its clocks from second to second, by more than the programs may differ.
    """
    counts = [_calls_per_sample(call, agree) for call in calls]
    times: list[list[float]] = [[] for _ in calls]
    for done in range(samples):
        spent = sum(map(sum, times))
        if done >= _MIN_SAMPLES and spent >= _ENOUGH_SECONDS * len(calls):
            break
        for i in range(len(calls)):
            turn = (i + done) % len(calls)
            times[turn].append(agree(_sample(calls[turn], counts[turn])))
    return [_timing(count, taken) for count, taken in zip(counts, times, strict=True)]


def _calls_per_sample(call: Callable[[], Any], agree: Agree) -> int:
    jax.block_until_ready(call())
    calls = 1
    while (taken := agree(_sample(call, calls))) < _SAMPLE_SECONDS and calls < _MAX_CALLS:
        calls = min(_MAX_CALLS, max(calls + 1, math.ceil(1.2 * calls * _SAMPLE_SECONDS / taken)))
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
