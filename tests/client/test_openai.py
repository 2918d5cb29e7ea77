"""The OpenAI client, against a server that answers what a test asks for. tests/eval and tests/bench test it in use."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from fastapi import FastAPI
from fastapi.responses import PlainTextResponse, StreamingResponse

from jax_mla_cp.client.openai import ModelNotFound, OpenAIClient, RequestError, RequestTimeout, error_message
from tests.helpers.fake_server import refuse, running


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    app = FastAPI()

    @app.get("/v1/models")
    def models() -> Any:
        return {"data": [{"id": "a"}, {"id": "b"}]}

    @app.post("/v1/completions")
    def completions(body: dict[str, Any]) -> Any:
        if body["prompt"] == "slow":
            time.sleep(1)
        if body["prompt"] == "refuse":
            return refuse(400, "too  long")
        if body["prompt"] == "text":
            return PlainTextResponse("hello")
        if body.get("stream"):
            return StreamingResponse(iter([b"data: 1\n\nda", b"ta: 2\n\n", b"data: [DONE]\n\ndata: 3\n\n"]))
        return {"echo": body}

    with running(app) as url:
        yield url


def call(url: str, ask: Callable[[OpenAIClient], Any], timeout: float = 30) -> Any:
    async def run() -> Any:
        async with OpenAIClient(url, timeout=timeout) as client:
            return await ask(client)

    return asyncio.run(run())


def test_the_model_is_the_one_asked_for(url: str) -> None:
    assert call(url, lambda client: client.choose_model("b")) == "b"
    with pytest.raises(ModelNotFound, match=r"has several models\. Use one of a, b\."):
        call(url, lambda client: client.choose_model(None))
    with pytest.raises(ModelNotFound, match=r"has no model 'c'\. Use one of a, b\."):
        call(url, lambda client: client.choose_model("c"))


def test_endpoints_that_not_every_server_has(url: str) -> None:
    assert call(url, lambda client: client.versions()) == {}
    assert call(url, lambda client: client.tokenize("a", "text")) is None


def test_failures(url: str) -> None:
    assert call(url, lambda client: client.complete({"prompt": "x"})) == {"echo": {"prompt": "x"}}
    with pytest.raises(RequestError, match=r"^too long$") as refused:
        call(url, lambda client: client.complete({"prompt": "refuse"}))
    assert (refused.value.kind, refused.value.status) == ("HTTP 400", 400)
    with pytest.raises(RequestError, match=r"POST /completions is answered by something that is not JSON"):
        call(url, lambda client: client.complete({"prompt": "text"}))
    with pytest.raises(RequestTimeout, match=r"no answer within 0\.2 seconds"):
        call(url, lambda client: client.complete({"prompt": "slow"}), timeout=0.2)
    with pytest.raises(RequestError) as nobody:
        call("http://127.0.0.1:9/v1", lambda client: client.choose_model("a"))
    assert (nobody.value.kind, nobody.value.status) == ("no connection", None)


def test_a_stream_ends_with_done(url: str) -> None:
    async def events(client: OpenAIClient) -> list[tuple[float, bytes]]:
        return [event async for event in client.stream({"prompt": "x", "stream": True})]

    before = time.perf_counter()
    found = call(url, events)
    assert [data for _, data in found] == [b"1", b"2"]
    assert before <= found[0][0] <= found[1][0] <= time.perf_counter()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"error": {"message": "a\\n b"}}', "a b"),
        ('{"object": "error", "message": "c"}', "c"),
        ("<html>bad gateway</html>", "<html>bad gateway</html>"),
        ("[1]", "[1]"),
        ("x" * 999, "x" * 300),
    ],
)
def test_error_messages(text: str, message: str) -> None:
    assert error_message(text) == message
