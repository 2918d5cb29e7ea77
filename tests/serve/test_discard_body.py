"""The rest of a body before an early answer: how long the server reads it, and when it doesn't. tests/clients/test_plain_http.py has
the clients that need it."""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Iterator

import pytest

from jax_mla_cp.serve.discard_body import DiscardBody
from jax_mla_cp.serve.middleware import MiddlewareStack
from tests.helpers.echo_server import Running, running

HEAD = b"POST /v1/completions HTTP/1.1\r\nhost: a\r\ncontent-type: application/json\r\n"
LENGTH = b"content-length: 30000000\r\n"
CHUNKED = b"transfer-encoding: chunked\r\n"
CHUNK = b"10000\r\n" + b" " * 65536 + b"\r\n"


@contextlib.contextmanager
def connected(server: Running) -> Iterator[socket.socket]:
    with socket.create_connection(server.address, timeout=10) as client:
        yield client


def answer(client: socket.socket) -> bytes:
    """All that comes until the server closes the connection."""
    found = b""
    with contextlib.suppress(ConnectionResetError):
        while part := client.recv(65536):
            found += part
    return found


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Running]:
    """With short limits: 1 s in all, 0.3 s without more."""
    monkeypatch.setattr(DiscardBody.__init__, "__defaults__", (1.0, 0.3))
    with running(MiddlewareStack(max_body=1 << 16)) as one:
        yield one


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> Iterator[Running]:
    """With limits that a test would notice."""
    monkeypatch.setattr(DiscardBody.__init__, "__defaults__", (20.0, 10.0))
    with running(MiddlewareStack(max_body=1 << 16)) as one:
        yield one


@pytest.mark.parametrize("begun", [LENGTH + b"\r\n" + b" " * 70_000, CHUNKED + b"\r\n" + 2 * CHUNK, LENGTH + b"\r\n"])
def test_a_client_that_stalls(server: Running, begun: bytes) -> None:
    """It waits for the answer."""
    with connected(server) as client:
        started = time.monotonic()
        client.sendall(HEAD + begun)
        assert b" 413 " in answer(client)
        assert 0.2 < time.monotonic() - started < 5


def test_a_client_that_never_ends(server: Running) -> None:
    with connected(server) as client:
        started = time.monotonic()
        client.sendall(HEAD + CHUNKED + b"\r\n" + 2 * CHUNK)
        with contextlib.suppress(ConnectionError):
            while time.monotonic() - started < 8:
                client.sendall(b"1\r\n \r\n")
                time.sleep(0.05)
        assert 0.9 < time.monotonic() - started < 5, "closed after its time"


@pytest.mark.parametrize("size", [LENGTH, CHUNKED])
def test_a_client_that_ends(patient: Running, size: bytes) -> None:
    """The answer comes at once after the last byte."""
    with connected(patient) as client:
        body = b" " * 30_000_000 if size == LENGTH else 100 * CHUNK + b"0\r\n\r\n"
        client.sendall(HEAD + size + b"\r\n" + body)
        sent = time.monotonic()
        assert b" 413 " in answer(client)
        assert time.monotonic() - sent < 5


def test_a_client_that_expects_to_be_asked(patient: Running) -> None:
    """It sends no body before it is told to: the answer is all that it gets."""
    with connected(patient) as client:
        started = time.monotonic()
        client.sendall(HEAD + LENGTH + b"expect: 100-continue\r\n\r\n")
        found = answer(client)
        assert found.startswith(b"HTTP/1.1 413 ") and b" 100 " not in found.partition(b"\r\n\r\n")[0]
        assert time.monotonic() - started < 5


def test_one_that_is_asked(patient: Running) -> None:
    body = b'{"model": "tiny", "prompt": "a", "max_tokens": 1}'
    with connected(patient) as client:
        client.sendall(
            HEAD + f"content-length: {len(body)}\r\nconnection: close\r\nexpect: 100-continue\r\n\r\n".encode()
        )
        assert client.recv(100).startswith(b"HTTP/1.1 100 ")
        client.sendall(body)
        assert answer(client).startswith(b"HTTP/1.1 200 ")


def test_a_client_that_goes_away(server: Running) -> None:
    with connected(server) as client:
        client.sendall(HEAD + LENGTH + b"\r\n" + b" " * 100_000)
    assert b" 200 " in server.raw(b"GET /health HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n")
