"""Messages between two processes over TCP: frames with a length and a CRC. Nothing in a frame is code: no pickle.

A frame is a header of 24 bytes, then its payload. The header is little-endian: magic, kind, three zero bytes, CRC-32 of the
payload, length of the payload, CRC-32 of these 20 bytes.
"""

from __future__ import annotations

import contextlib
import enum
import socket
import struct
import threading
import zlib

_HEADER = struct.Struct("<4sB3xIQ")
_HEADER_CRC = struct.Struct("<I")
_MAGIC = b"jmcp"
_MAX_PAYLOAD = 1 << 32


class Kind(enum.IntEnum):
    """Kinds of messages. The leader is process 0."""

    HEARTBEAT = 1
    COMPILE = 2
    """Leader to followers: the shape of the next step, whose program is new, so that all compile it at the same time."""
    STEP = 3
    """Leader to followers: a step to execute."""
    ECHO = 4
    """Follower to leader: a step has been executed."""
    DRAIN = 5
    """Follower to leader: end when the requests have ended."""
    STOP = 6
    """Leader to followers: all steps are over."""
    FAILED = 7
    """Either way: the sender can't go on. The payload is the reason."""
    REFUSED = 8
    """As FAILED, for a setting that can't work."""


class CorruptMessage(Exception):
    """A frame that its sender can't have sent."""


class Wire:
    """One connection. `send` may be called from any thread, `receive` from one."""

    def __init__(self, connection: socket.socket):
        connection.settimeout(None)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._socket = connection
        self._sending = threading.Lock()

    def send(self, kind: Kind, payload: bytes | memoryview = b"", crc: int | None = None) -> None:
        """Sends a message. `crc` is the payload's CRC-32, if it is known.

        Raises:
          OSError: the connection is closed.
        """
        header = _HEADER.pack(_MAGIC, kind, zlib.crc32(payload) if crc is None else crc, len(payload))
        header += _HEADER_CRC.pack(zlib.crc32(header))
        with self._sending:
            sent = self._socket.sendmsg((header, payload))
            if sent < len(header) + len(payload):
                self._socket.sendall(memoryview(b"".join((header, payload)))[sent:])

    def receive(self) -> tuple[Kind, memoryview, int]:
        """Waits for a message: its kind, its payload, and the payload's CRC-32.

        Raises:
          ConnectionError: the other side has closed the connection.
          OSError: the connection is broken.
          CorruptMessage: the bytes are no frame, or the payload has another CRC.
        """
        header = self._exactly(_HEADER.size + _HEADER_CRC.size)
        magic, kind, crc, length = _HEADER.unpack_from(header)
        (header_crc,) = _HEADER_CRC.unpack_from(header, _HEADER.size)
        if zlib.crc32(header[: _HEADER.size]) != header_crc:
            raise CorruptMessage(f"a frame begins with {bytes(header).hex()}, which is no header.")
        if magic != _MAGIC or kind not in Kind._value2member_map_ or length > _MAX_PAYLOAD:
            raise CorruptMessage(f"a frame begins with {magic!r}, kind {kind}, {length} bytes.")
        payload = self._exactly(length)
        if zlib.crc32(payload) != crc:
            raise CorruptMessage(f"a {Kind(kind).name} message of {length} bytes has another CRC than it says.")
        return Kind(kind), payload, crc

    def close(self) -> None:
        """Ends the connection: a `receive` that waits, here or at the other side, raises."""
        with contextlib.suppress(OSError):  # the other side was first
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()

    def _exactly(self, count: int) -> memoryview:
        buffer = memoryview(bytearray(count))
        read_into(self._socket, buffer)
        return buffer


def read_into(connection: socket.socket, buffer: memoryview) -> None:
    """Fills a buffer from a connection.

    Raises:
      ConnectionError: it was closed before.
      OSError: it is broken, or a timeout that is set on it is over.
    """
    filled = 0
    while filled < len(buffer):
        count = connection.recv_into(buffer[filled:])
        if not count:
            raise ConnectionError("the connection was closed.")
        filled += count
