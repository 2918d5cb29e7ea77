"""Mutual authentication of two processes by a shared key: each proves that it has it, with HMAC-SHA256 over both nonces.

It keeps strangers and processes of other clusters out. What follows is not encrypted, as NCCL's traffic is not: the network
between the hosts must be the cluster's own (docs/running-safely.md).
"""

from __future__ import annotations

import hashlib
import hmac
import os
import secrets
import socket
import struct
import time
from pathlib import Path

from jax_mla_cp.config.errors import ConfigError
from jax_mla_cp.distributed.store import Store
from jax_mla_cp.distributed.wire import read_into

KEY_VARIABLE = "JAX_MLA_CP_CLUSTER_KEY"
_MIN_KEY = 16
_NONCE = 32
_SECONDS = 5.0
"""Seconds that a handshake may take in all."""
_ANSWER = struct.Struct(f"<I{_NONCE}s{hashlib.sha256().digest_size}s")


class Refused(Exception):
    """The other side does not have the key, or does not speak this protocol."""


def cluster_key(file: Path | None, store: Store, process_id: int) -> bytes:
    """The key: the file's first line, the environment's, or one that process 0 makes and publishes.

    Raises:
      ConfigError: the file can't be read, or a key is too short.
    """
    if file is not None:
        try:
            text = (file.read_text().splitlines() or [""])[0].strip()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError("cluster_key_file", f"{file} can't be read: {error}") from error
        source = str(file)
    else:
        text, source = os.environ.get(KEY_VARIABLE, "").strip(), f"the variable {KEY_VARIABLE}"
        if not text:
            if process_id == 0:
                store.publish("key", secrets.token_hex(32))
            return store.read("key", 0).encode()
    if len(text) < _MIN_KEY:
        raise ConfigError(
            "cluster_key_file",
            f"{source} must hold at least {_MIN_KEY} characters in its first line, got {len(text)}. Make one with `openssl rand -hex 32`.",
        )
    return text.encode()


def accept(connection: socket.socket, key: bytes) -> int:
    """The leader's side, over a new connection. Returns the follower's process id.

    Raises:
      Refused, OSError: the other side has not shown the key in time.
    """
    with _Deadline(connection) as deadline:
        nonce = secrets.token_bytes(_NONCE)
        connection.sendall(nonce)
        process, theirs, proof = _ANSWER.unpack(deadline.read(_ANSWER.size))
        if not hmac.compare_digest(proof, _proof(key, b"follower", nonce, theirs, process)):
            raise Refused("it does not have this cluster's key.")
        connection.sendall(_proof(key, b"leader", nonce, theirs, process))
    return int(process)


def connect(connection: socket.socket, key: bytes, process_id: int) -> None:
    """A follower's side.

    Raises:
      Refused, OSError: the other side is not this cluster's leader.
    """
    with _Deadline(connection) as deadline:
        theirs = bytes(deadline.read(_NONCE))
        nonce = secrets.token_bytes(_NONCE)
        connection.sendall(_ANSWER.pack(process_id, nonce, _proof(key, b"follower", theirs, nonce, process_id)))
        try:
            proof = deadline.read(hashlib.sha256().digest_size)
        except ConnectionError as error:
            raise Refused("it refuses this process's key.") from error
        if not hmac.compare_digest(proof, _proof(key, b"leader", theirs, nonce, process_id)):
            raise Refused("it does not have this cluster's key.")


def _proof(key: bytes, role: bytes, leader: bytes, follower: bytes, process: int) -> bytes:
    message = b"|".join((role, leader, follower, str(process).encode()))
    return hmac.new(key, message, hashlib.sha256).digest()


class _Deadline:
    """Limits all reads of a handshake together, whatever the other side sends."""

    def __init__(self, connection: socket.socket):
        self._connection, self._until = connection, time.monotonic() + _SECONDS

    def __enter__(self) -> _Deadline:
        self._connection.settimeout(_SECONDS)
        return self

    def __exit__(self, *_: object) -> None:
        self._connection.settimeout(None)

    def read(self, count: int) -> memoryview:
        buffer = memoryview(bytearray(count))
        for i in range(count):  # one byte at a time: a timeout of the socket would begin anew with each
            left = self._until - time.monotonic()
            if left <= 0:
                raise TimeoutError(f"the handshake took longer than {_SECONDS:g} s.")
            self._connection.settimeout(left)
            read_into(self._connection, buffer[i : i + 1])
        return buffer
