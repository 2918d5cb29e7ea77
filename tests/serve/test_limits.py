"""Requests that are too much: refused by their bytes, and the server answers the next one."""

from __future__ import annotations

import contextlib
import http.client
import json
import math
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jax_mla_cp.serve import limits
from jax_mla_cp.serve.connection import Connection
from jax_mla_cp.serve.errors import ApiError
from jax_mla_cp.serve.limits import (
    MAX_CONTAINERS,
    MAX_DEPTH,
    MAX_HEADER_BYTES,
    MAX_HEADERS,
    LimitRequestSize,
    check_json,
)
from jax_mla_cp.serve.middleware import MiddlewareStack
from tests.helpers.echo_server import BODY, Running, running
from tests.helpers.waiting import until

JSON = {"content-type": "application/json"}


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with running(MiddlewareStack(max_body=1 << 20)) as server:
        yield server


def post(server: Running, content: Any, headers: dict[str, str] = JSON) -> httpx.Response:
    answer = httpx.post(f"{server.url}/v1/completions", content=content, headers=headers)
    if answer.status_code != 200:
        assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
    return answer


@pytest.fixture(autouse=True)
def _healthy_afterwards(request: pytest.FixtureRequest) -> Iterator[None]:
    yield
    if "server" in request.fixturenames:
        assert post(request.getfixturevalue("server"), json.dumps(BODY)).json()["choices"][0]["text"] == "aaa"


def test_bodies_that_are_too_large(server: Running) -> None:
    """They may say so or not."""
    whole = post(server, b" " * (1 << 20) + b"{")
    assert whole.status_code == 413 and "1048576 bytes" in whole.json()["error"]["message"]
    before = len(server.engine.requests)
    chunked = post(server, (b" " * 100_000 for _ in range(30)))
    assert chunked.status_code == 413 and chunked.headers["connection"] == "close"
    lying = f"POST /v1/completions HTTP/1.1\r\nhost: a\r\ncontent-type: application/json\r\ncontent-length: {1 << 40}\r\n\r\n"
    assert b" 413 " in server.raw(lying.encode())
    assert len(server.engine.requests) == before
    exact = json.dumps(BODY).encode().ljust(1 << 20)
    assert post(server, exact).status_code == 200


def test_headers_that_are_too_many_or_too_long(server: Running) -> None:
    """CVE-2025-48956: in one piece, in many small ones, and never ending."""
    body = json.dumps(BODY)
    many = post(server, body, JSON | {f"x-{i}": "a" for i in range(MAX_HEADERS)})
    assert many.status_code == 431 and f"the limits are {MAX_HEADERS} headers" in many.json()["error"]["message"]
    long = post(server, body, JSON | {"x-long": "a" * MAX_HEADER_BYTES})
    # Over uvicorn's own limit, unless all of it came at once.
    assert long.status_code == 431
    head = b"GET /health HTTP/1.1\r\nhost: a\r\nx-long: "
    assert b" 400 " in server.raw(head + b"a" * (2 * MAX_HEADER_BYTES))
    assert httpx.get(f"{server.url}/health?{'a' * 9000}").status_code == 414


def test_only_json_is_taken(server: Running) -> None:
    """A stranger's web page can post plain text and forms to this machine's port without asking; JSON it can't."""
    body = json.dumps(BODY)
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data", "application/xml", ""):
        answer = post(server, body, {"content-type": kind})
        assert answer.status_code == 415 and "application/json" in answer.json()["error"]["message"]
    assert httpx.post(f"{server.url}/v1/completions", content=body).status_code == 415
    assert post(server, body, {"content-type": "Application/JSON; charset=utf-8"}).status_code == 200
    assert post(server, body, JSON | {"content-encoding": "gzip"}).status_code == 415


NOT_JSON = {
    "NaN": (b'{"model": "tiny", "prompt": "a", "temperature": NaN}', "NaN is not a number"),
    "Infinity": (b'{"model": "tiny", "prompt": "a", "metadata": {"x": -Infinity}}', "Infinity is not a number"),
    "deep arrays": (b"[" * 100_000, "nested 100000 levels deep"),
    "deep objects": (b'{"prompt": ' + b'{"a":' * 101 + b"1" + b"}" * 102, "nested 102 levels deep"),
    "deep after a string": (b'{"a\\\\": ' + b"[" * 101, "nested 102 levels deep"),
    "UTF-16": (json.dumps(BODY).encode("utf-16-le"), "is NUL"),
    "UTF-16 with a mark": (json.dumps(BODY).encode("utf-16"), "not UTF-8"),
    "UTF-32": (json.dumps(BODY).encode("utf-32-be"), "is NUL"),
    "Latin-1": ('{"model": "tiny", "prompt": "é"}'.encode("latin-1"), "byte 29 is not UTF-8"),
    "empty": (b"", "body"),
    "cut off": (b'{"model": "tiny", "prompt": "a', "not valid JSON"),
    "a huge number": (b'{"model": "tiny", "prompt": "a", "seed": ' + b"9" * 5000 + b"}", ""),
}


@pytest.mark.parametrize("name", NOT_JSON)
def test_what_python_would_parse_though_json_is_other(server: Running, name: str) -> None:
    body, message = NOT_JSON[name]
    answer = post(server, body)
    assert answer.status_code == 400 and message in answer.json()["error"]["message"]


def test_words_in_strings_are_only_words(server: Running) -> None:
    prompt = 'NaN Infinity \\" [[[[ {{{{ \\\\' + "[" * 1000
    assert post(server, json.dumps({**BODY, "prompt": prompt[:500], "max_tokens": 3})).status_code == 200


@given(
    st.recursive(
        st.none() | st.floats() | st.text() | st.text('"\\[]{}Na'),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text('"\\[]{}'), inner, max_size=3),
        max_leaves=30,
    )
)
def test_the_check_agrees_with_the_parser(value: object) -> None:
    def sound(value: object) -> bool:
        if isinstance(value, float):
            return math.isfinite(value)
        inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
        return all(map(sound, inner))

    body = json.dumps(value, ensure_ascii=False).encode(errors="replace")
    if sound(value):
        check_json(body)
    else:
        with pytest.raises(ApiError, match="not a number"):
            check_json(body)


def test_depth_is_counted_over_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "_BLOCK", 7)
    check_json(b"[" * MAX_DEPTH + b"]" * MAX_DEPTH + b"[]" * 200)
    with pytest.raises(ApiError, match=f"nested {MAX_DEPTH + 1} levels deep"):
        check_json(b"[]" * 50 + b"[" * (MAX_DEPTH + 1) + b"]" * (MAX_DEPTH + 1))


def test_arrays_and_objects_are_counted_outside_of_strings() -> None:
    check_json(b"[" + b"{}," * (MAX_CONTAINERS - 1) + b'"' + b"{[" * MAX_CONTAINERS + b'"]')
    with pytest.raises(ApiError, match=f"{MAX_CONTAINERS + 1} arrays and objects; the limit is {MAX_CONTAINERS}"):
        check_json(b"[" + b"{}," * MAX_CONTAINERS + b"0]")


@pytest.mark.parametrize("unit", [b"[", b"[],", b'"', b'\\"', b'"\\"', b'"a",', b"\\", b'"\\', b"1,"], ids=repr)
def test_the_check_takes_linear_time(unit: bytes) -> None:
    """4 MB of whatever is quickest to say and slowest to check."""
    started = time.perf_counter()
    with contextlib.suppress(ApiError):
        check_json(unit * (4_000_000 // len(unit)))
    assert time.perf_counter() - started < 5


def test_slow_bodies_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LimitRequestSize.__init__, "__defaults__", (1 << 20, 0.2))
    with running() as server:
        head = (
            b"POST /v1/completions HTTP/1.1\r\nhost: a\r\ncontent-type: application/json\r\ncontent-length: 50\r\n\r\n{"
        )
        assert b" 408 " in server.raw(head)
        assert not server.engine.requests


@pytest.mark.parametrize("sent", [b"", b"GET /health HTT", b"GET /health HTTP/1.1\r\nx: "])
def test_slow_headers_end(sent: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    """Slowloris: a connection that never gets to its request."""
    monkeypatch.setattr(Connection, "head_seconds", 0.3)
    with running() as server:
        started = time.monotonic()
        assert server.raw(sent) == b""
        assert 0.2 < time.monotonic() - started < 5


def test_a_connection_that_is_used_is_not_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a client that doesn't connect again by itself."""
    monkeypatch.setattr(Connection, "head_seconds", 0.3)
    with running() as server, contextlib.closing(http.client.HTTPConnection(*server.address)) as client:
        for pause in (0.5, 0):
            client.request("GET", "/health")
            assert client.getresponse().read() == b'{"status":"ok"}'
            time.sleep(pause)


def test_a_slow_answer_is_no_slow_client(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Connection, "head_seconds", 0.1)
    with running() as server:
        server.engine.gate = gate = threading.Semaphore(0)
        with httpx.stream("POST", f"{server.url}/v1/completions", json={**BODY, "stream": True}) as answer:
            time.sleep(0.4)
            gate.release(3)
            assert answer.read().count(b'"text":"a"') == 3


@contextlib.contextmanager
def unread(server: Running, monkeypatch: pytest.MonkeyPatch) -> Iterator[socket.socket]:
    """The client's end of a stream whose first half fills the buffers, once the server waits for somebody to read it. The
    other half comes with more permits."""
    server.engine.gate = threading.Semaphore(3000)
    waits = threading.Event()
    pause = Connection.pause_writing

    def paused(connection: Connection) -> None:
        pause(connection)
        waits.set()

    monkeypatch.setattr(Connection, "pause_writing", paused)
    with socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.connect(server.address)
        body = json.dumps({"model": "tiny", "prompt": [[1]] * 20, "max_tokens": 300, "stream": True}).encode()
        head = f"POST /v1/completions HTTP/1.1\r\nhost: a\r\ncontent-type: application/json\r\nconnection: close\r\ncontent-length: {len(body)}\r\n\r\n"
        client.sendall(head.encode() + body)
        assert waits.wait(20)
        yield client


def test_readers_that_stop_reading_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Connection, "stall_seconds", 0.3)
    with running(send_buffer=4096) as server, unread(server, monkeypatch):
        until(lambda: not server.server.server_state.connections)


def test_a_reader_that_goes_on_is_not_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    # Far more than a busy machine may keep the reader, or the server's loop, from running.
    monkeypatch.setattr(Connection, "stall_seconds", 5)
    with running(send_buffer=4096) as server, unread(server, monkeypatch) as client:
        client.settimeout(6)
        with contextlib.suppress(TimeoutError):  # when nothing is unread, for longer than a client may stall
            while client.recv(65536):
                pass
        assert server.engine.gate is not None
        server.engine.gate.release(3000)
        client.settimeout(60)
        rest = b""
        while part := client.recv(65536):
            rest = rest[-10:] + part
        assert b"[DONE]" in rest, "cut off"
