"""Progress of compilation, which logs and the status page show."""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager


@dataclasses.dataclass(frozen=True)
class CompileProgress:
    """The compilation in progress; with several, the one that began first."""

    done: int
    """Programs compiled so far."""
    total: int
    """Programs of the runner, compiled or not."""
    tokens: int
    """Tokens per step and dp group of the program that is being compiled."""
    since: float
    """`time.monotonic()` at its start."""

    def __str__(self) -> str:
        return f"compiling {self.done + 1} of {self.total} programs: {self.tokens} tokens per step"


class CompileTracker:
    """Counts compiled programs and those in progress. Thread-safe."""

    def __init__(self, total: int):
        self._total = total
        self._done = 0
        self._in_progress: list[CompileProgress] = []
        self._lock = threading.Lock()

    @property
    def progress(self) -> CompileProgress | None:
        """The state now; None: nothing is being compiled."""
        with self._lock:
            if not self._in_progress:
                return None
            return dataclasses.replace(self._in_progress[0], done=self._done)

    @contextmanager
    def compiling(self, tokens: int) -> Iterator[CompileProgress]:
        """Counts one program as in progress, and as done if the block succeeds. Yields its number as `done + 1`."""
        with self._lock:
            started = CompileProgress(self._done + len(self._in_progress), self._total, tokens, since=time.monotonic())
            self._in_progress.append(started)
        try:
            yield started
        except BaseException:
            with self._lock:
                self._in_progress.remove(started)
            raise
        with self._lock:
            self._in_progress.remove(started)
            self._done += 1
