"""Sliding windows of the last two minutes for the status page's charts: latencies and rates per second."""

from __future__ import annotations

import collections
import math
import threading
import time
from collections.abc import Callable, Mapping

WINDOW_SECONDS = 120

_PER_OCTAVE = 8  # buckets per factor of 2: values are exact to 4%


class LatencyWindow:
    """A histogram of durations for each second. Its buckets are logarithmic, so memory does not grow with the rate.

    Thread-safe: the engine's thread adds, and never waits for more than a copy of the counts."""

    def __init__(self, now: Callable[[], float] = time.monotonic):
        self._now = now
        self._lock = threading.Lock()
        self._seconds: collections.deque[tuple[int, collections.Counter[int]]] = collections.deque(
            maxlen=WINDOW_SECONDS
        )

    def add(self, seconds: float) -> None:
        second, bucket = int(self._now()), round(math.log2(max(seconds, 1e-6)) * _PER_OCTAVE)
        with self._lock:
            if not self._seconds or self._seconds[-1][0] != second:
                self._seconds.append((second, collections.Counter()))
            self._seconds[-1][1][bucket] += 1

    def series(self) -> list[tuple[int, float, float]]:
        """(seconds ago, median, 99th percentile), oldest first, without seconds that have no values."""
        return [(age, percentile(counts, 0.5), percentile(counts, 0.99)) for age, counts in self._recent()]

    def summary(self) -> tuple[float, float] | None:
        """(median, 99th percentile) over the window; None if it is empty."""
        total: collections.Counter[int] = collections.Counter()
        for _, counts in self._recent():
            total.update(counts)
        return (percentile(total, 0.5), percentile(total, 0.99)) if total else None

    def _recent(self) -> list[tuple[int, dict[int, int]]]:
        now = int(self._now())
        with self._lock:
            return [(now - second, dict(counts)) for second, counts in self._seconds if now - second < WINDOW_SECONDS]


class RateWindow:
    """Counts per second. Thread-safe."""

    def __init__(self, now: Callable[[], float] = time.monotonic):
        self._now = now
        self._lock = threading.Lock()
        self._seconds: collections.deque[tuple[int, int]] = collections.deque(maxlen=WINDOW_SECONDS)

    def add(self, amount: int) -> None:
        second = int(self._now())
        with self._lock:
            if self._seconds and self._seconds[-1][0] == second:
                amount += self._seconds.pop()[1]
            self._seconds.append((second, amount))

    def series(self) -> list[tuple[int, int]]:
        """(seconds ago, count), oldest first, without the current second and seconds that have no count."""
        now = int(self._now())
        with self._lock:
            return [(now - second, amount) for second, amount in self._seconds if 0 < now - second < WINDOW_SECONDS]


def percentile(counts: Mapping[int, int], share: float) -> float:
    """The value that a `share` of the values does not exceed, exact to the width of a bucket (4%).

    >>> round(percentile({0: 98, 8: 2}, 0.99), 3), round(percentile({0: 98, 8: 2}, 0.5), 3)
    (2.0, 1.0)
    """
    left = math.ceil(share * sum(counts.values()))
    for bucket in sorted(counts):
        left -= counts[bucket]
        if left <= 0:
            break
    return float(2 ** (bucket / _PER_OCTAVE))
