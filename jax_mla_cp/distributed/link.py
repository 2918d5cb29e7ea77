"""`Link`: a connection to another process with its threads: one receives, one sends heartbeats."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

from jax_mla_cp.distributed.wire import CorruptMessage, Kind, Wire

log = logging.getLogger(__name__)

_BEATS = 5
"""Heartbeats in the time after which a process counts as lost."""


class Link:
    """Another process. Heartbeats have a thread of their own: they stop only if the interpreter does.

    Args:
      on_message: called with each message but heartbeats, on the receiving thread: kind, payload, the payload's CRC.
      on_lost: called once, with the reason, when the connection has ended or brought a corrupt message.
    """

    def __init__(
        self,
        wire: Wire,
        heartbeat_timeout: float,
        on_message: Callable[[Kind, memoryview, int], None],
        on_lost: Callable[[str], None],
    ):
        self._wire = wire
        self._timeout = heartbeat_timeout
        self._on_message, self._on_lost = on_message, on_lost
        self._heard = time.monotonic()
        self._ended = threading.Event()
        self._receiver = threading.Thread(target=self._receive, name="cluster-receive", daemon=True)
        self._heart = threading.Thread(target=self._beat, name="cluster-heartbeat", daemon=True)

    def start(self) -> None:
        self._heard = time.monotonic()
        self._receiver.start()
        self._heart.start()

    @property
    def silence(self) -> float:
        """Seconds since the last message."""
        return time.monotonic() - self._heard

    def send(self, kind: Kind, payload: bytes | memoryview = b"", crc: int | None = None) -> None:
        """Sends a message; of a connection that has ended, the receiving thread tells."""
        try:
            self._wire.send(kind, payload, crc)
        except OSError:
            self._wire.close()

    @property
    def is_closed(self) -> bool:
        return self._ended.is_set()

    def wait_closed(self, seconds: float) -> bool:
        """Waits until the other side has closed the connection. Returns False if it has not."""
        return self._ended.wait(seconds)

    def _receive(self) -> None:
        try:
            while True:
                kind, payload, crc = self._wire.receive()
                self._heard = time.monotonic()
                if kind is not Kind.HEARTBEAT:
                    self._on_message(kind, payload, crc)
        except CorruptMessage as error:
            reason = f"sent a corrupt message: {error}"
        except OSError:
            reason = "closed its connection: it has ended or was killed."
        except Exception as error:
            log.exception("a message could not be handled")
            reason = f"sent a message that could not be handled: {error}"
        finally:
            self._ended.set()
        self._on_lost(reason)

    def _beat(self) -> None:
        while not self._ended.wait(self._timeout / _BEATS):
            self.send(Kind.HEARTBEAT)
