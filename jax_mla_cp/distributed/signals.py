"""SIGINT and SIGTERM while the main thread is inside of C++ code: a compilation, or waiting for other processes."""

from __future__ import annotations

import signal
import socket
import threading
from collections.abc import Callable
from typing import Self

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class SignalThread:
    """Calls `action` on a thread of its own for each signal, until the end of a `with` block on the main thread. Python's own
    handlers would wait until the main thread comes back."""

    def __init__(self, action: Callable[[], None]):
        self.action = action
        """May be replaced at any time."""
        self._reader, self._writer = socket.socketpair()

    def __enter__(self) -> Self:
        self._writer.setblocking(False)
        # A handler that does nothing, so that the signal is taken, and its number written.
        self._before = {number: signal.signal(number, lambda number, frame: None) for number in SIGNALS}
        signal.set_wakeup_fd(self._writer.fileno())
        threading.Thread(target=self._run, name="signals", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        signal.set_wakeup_fd(-1)
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._writer.close()  # ends the thread

    def _run(self) -> None:
        with self._reader:
            while number := self._reader.recv(1):
                if number[0] in SIGNALS:
                    self.action()
