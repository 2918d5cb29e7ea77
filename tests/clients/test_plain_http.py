"""Clients that send the whole body before they read: urllib and http.client, which `requests` and OpenAI's are not."""

from __future__ import annotations

import contextlib
import http.client
import json
import urllib.error
import urllib.request
from collections.abc import Iterator
from typing import Any

import pytest

from jax_mla_cp.serve.discard_body import DiscardBody
from jax_mla_cp.serve.middleware import MiddlewareStack
from jax_mla_cp.serve.security import ApiKeys
from tests.helpers.echo_server import BODY, Running, running

KEY = "a-key-of-the-tests"
BIG = b" " * (30 << 20)
"""Bytes: more than the system keeps of what a server doesn't read."""


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with running(MiddlewareStack(max_body=1 << 20, keys=ApiKeys({KEY}))) as one:
        yield one


def headers(key: str = KEY) -> dict[str, str]:
    return {"content-type": "application/json", "authorization": f"Bearer {key}"}


def with_urllib(server: Running, body: bytes, key: str = KEY) -> tuple[int, dict[str, Any]]:
    request = urllib.request.Request(f"{server.url}/v1/completions", body, headers(key))
    try:
        with urllib.request.urlopen(request, timeout=20) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def test_urllib(server: Running) -> None:
    assert with_urllib(server, json.dumps(BODY).encode())[0] == 200
    status, answer = with_urllib(server, BIG)
    assert status == 413 and "1048576 bytes" in answer["error"]["message"]
    status, answer = with_urllib(server, BIG, "a-wrong-key")
    assert status == 401 and answer["error"]["code"] == "invalid_api_key"


@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize(("key", "status"), [(KEY, 413), ("a-wrong-key", 401)])
def test_http_client(server: Running, chunked: bool, key: str, status: int) -> None:
    """With Content-Length, and in chunks."""
    body: Any = (BIG[i : i + 65536] for i in range(0, len(BIG), 65536)) if chunked else BIG
    with contextlib.closing(http.client.HTTPConnection(*server.address, timeout=20)) as client:
        client.request("POST", "/v1/completions", body, headers(key), encode_chunked=chunked)
        answer = client.getresponse()
        assert answer.status == status and json.load(answer)["error"]["message"]
        if status == 401:  # the whole body has been read, so the connection is as good as new
            client.request("POST", "/v1/completions", json.dumps(BODY), headers())
            assert client.getresponse().status == 200


def test_why_the_body_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """The answer is lost without."""

    async def skip(*_: Any) -> None:
        pass

    monkeypatch.setattr(DiscardBody, "_discard", skip)
    with running(MiddlewareStack(max_body=1 << 20)) as server, pytest.raises((urllib.error.URLError, ConnectionError)):
        with_urllib(server, BIG)
