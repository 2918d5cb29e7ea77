"""Health, readiness, what the engine is given and refuses, and the drain, over an engine without a model."""

from __future__ import annotations

import threading
import time

import httpx
import openai
import pytest

from jax_mla_cp.engine import EngineDead, Failed, QueueFull
from jax_mla_cp.engine.request import FailedKind
from jax_mla_cp.serve.errors import failure
from tests.helpers.echo_server import BODY, SEED, Running, running
from tests.helpers.waiting import until


def test_health_and_readiness() -> None:
    with running() as server, httpx.Client(base_url=server.url) as client:
        assert client.get("/health").json() == {"status": "ok"}
        assert client.get("/ready").json() == {"status": "ready"}
        assert client.get("/version").json()["version"]
        server.engine.unhealthy_reason = "3 steps failed in a row."
        for path in ("/health", "/ready"):
            answer = client.get(path)
            assert answer.status_code == 503 and "3 steps failed in a row." in answer.json()["error"]["message"]


def test_what_the_engine_refuses() -> None:
    with running() as server:
        server.engine.refuse = QueueFull("1024 requests wait already.")
        full = httpx.post(f"{server.url}/v1/completions", json=BODY)
        assert full.status_code == 503 and int(full.headers["retry-after"]) >= 1
        assert full.json()["error"]["code"] == "queue_full" and "1024" in full.json()["error"]["message"]
        server.engine.refuse = EngineDead("the engine is dead")
        dead = httpx.post(f"{server.url}/v1/completions", json=BODY)
        assert dead.status_code == 503 and dead.json()["error"]["code"] == "engine_dead"


@pytest.mark.parametrize(("given", "want"), [({}, SEED), ({"seed": 5}, 5), ({"seed": 0}, 0), ({"seed": -1}, 2**64 - 1)])
def test_seeds(given: dict[str, int], want: int) -> None:
    """The request's, or else the server's; choice i of a prompt takes i more."""
    with running() as server:
        assert httpx.post(f"{server.url}/v1/completions", json={**BODY, "n": 3, **given}).status_code == 200
        assert [r.sampling.seed for r in server.engine.requests] == [(want + i) % 2**64 for i in range(3)]


@pytest.mark.parametrize(
    ("kind", "status", "retry"),
    [
        ("step", 500, None),
        ("internal", 500, None),
        ("grammar", 400, None),
        ("timeout", 408, None),
        ("queue_timeout", 503, "1"),
        ("stopping", 503, "1"),
        ("dead", 503, None),
    ],
)
def test_what_a_failed_request_is_told(kind: FailedKind, status: int, retry: str | None) -> None:
    answer = failure(Failed("why", kind)).response()
    assert answer.status_code == status and answer.headers.get("retry-after") == retry
    assert (answer.headers.get("x-should-retry") == "false") == (kind == "timeout")


def streaming(server: Running) -> tuple[threading.Thread, list[str]]:
    """A stream of three tokens, read on a thread, that has begun and waits for permits."""
    texts: list[str] = []

    def read() -> None:
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
        try:
            for chunk in client.completions.create(model="tiny", prompt="Hi", max_tokens=3, stream=True):
                texts.append(chunk.choices[0].text)
        except openai.APIError as error:
            texts.append(error.message)

    server.engine.gate = threading.Semaphore(1)
    thread = threading.Thread(target=read, daemon=True)
    thread.start()
    until(lambda: texts)
    return thread, texts


def test_a_drain_finishes_what_runs_and_refuses_what_is_new() -> None:
    with running() as server:
        reader, texts = streaming(server)
        server.server.begin_drain()
        assert httpx.get(f"{server.url}/ready").status_code == 503
        for path in ("/health", "/version", "/metrics", "/status", "/", "/page/main.js", "/page/style.css"):
            assert httpx.get(server.url + path).status_code == 200, "nobody should kill it now, and it is watched"
        assert httpx.get(f"{server.url}/v1/models").status_code == 503
        refused = httpx.post(f"{server.url}/v1/completions", json=BODY)
        assert refused.status_code == 503 and refused.headers["retry-after"]
        assert refused.json()["error"]["code"] == "stopping"
        assert server.engine.gate is not None
        server.engine.gate.release(10)
        reader.join(10)
        assert "".join(texts) == "aaa"
        server.thread.join(10)
        assert not server.thread.is_alive() and not server.server.cut_off
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"{server.url}/ready")


def test_a_drain_ends_in_time() -> None:
    with running(drain_seconds=0.3) as server:
        reader, texts = streaming(server)
        started = time.monotonic()
        server.server.begin_drain()
        reader.join(10)
        assert texts[0] == "a" and "The server is stopping." in texts[-1]
        server.thread.join(10)
        assert not server.thread.is_alive() and server.server.cut_off
        assert time.monotonic() - started < 8
