"""The last two minutes, for the status page's charts: latencies and rates per second, in little memory."""

from __future__ import annotations

import collections
import math
import threading
import time
from collections.abc import Callable, Mapping

SECONDS = 120
"""How far back the page looks."""

_PER_OCTAVE = 8  # values are kept to 2^(1/8): 4% about the middle of their bucket


class Latencies:
    """Durations per second, counted in logarithmic buckets, so that no rate of tokens fills the memory. Thread-safe: the
    engine's thread adds, and never waits for more than a copy of the counts."""

    def __init__(self, now: Callable[[], float] = time.monotonic):
        self._now = now
        self._lock = threading.Lock()
        self._seconds: collections.deque[tuple[int, collections.Counter[int]]] = collections.deque(maxlen=SECONDS)

    def add(self, seconds: float) -> None:
        second, bucket = int(self._now()), round(math.log2(max(seconds, 1e-6)) * _PER_OCTAVE)
        with self._lock:
            if not self._seconds or self._seconds[-1][0] != second:
                self._seconds.append((second, collections.Counter()))
            self._seconds[-1][1][bucket] += 1

    def series(self) -> list[tuple[int, float, float]]:
        """(seconds ago, median, 99th percentile), oldest first; seconds without a value are left out."""
        return [(age, percentile(counts, 0.5), percentile(counts, 0.99)) for age, counts in self._recent()]

    def summary(self) -> tuple[float, float] | None:
        """(median, 99th percentile) of all of them; None without any."""
        total: collections.Counter[int] = collections.Counter()
        for _, counts in self._recent():
            total.update(counts)
        return (percentile(total, 0.5), percentile(total, 0.99)) if total else None

    def _recent(self) -> list[tuple[int, dict[int, int]]]:
        now = int(self._now())
        with self._lock:
            return [(now - second, dict(counts)) for second, counts in self._seconds if now - second < SECONDS]


class Rates:
    """Amounts per second. Thread-safe."""

    def __init__(self, now: Callable[[], float] = time.monotonic):
        self._now = now
        self._lock = threading.Lock()
        self._seconds: collections.deque[tuple[int, int]] = collections.deque(maxlen=SECONDS)

    def add(self, amount: int) -> None:
        second = int(self._now())
        with self._lock:
            if self._seconds and self._seconds[-1][0] == second:
                amount += self._seconds.pop()[1]
            self._seconds.append((second, amount))

    def series(self) -> list[tuple[int, int]]:
        """(seconds ago, amount in that second), oldest first, whole seconds only; those with nothing are left out."""
        now = int(self._now())
        with self._lock:
            return [(now - second, amount) for second, amount in self._seconds if 0 < now - second < SECONDS]


def percentile(counts: Mapping[int, int], share: float) -> float:
    """The value that `share` of the values do not exceed, as exact as the buckets are (4%).

    >>> round(percentile({0: 98, 8: 2}, 0.99), 3), round(percentile({0: 98, 8: 2}, 0.5), 3)
    (2.0, 1.0)
    """
    left = math.ceil(share * sum(counts.values()))
    for bucket in sorted(counts):
        left -= counts[bucket]
        if left <= 0:
            break
    return float(2 ** (bucket / _PER_OCTAVE))
