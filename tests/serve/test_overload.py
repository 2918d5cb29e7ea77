"""A server that has too much to do, whose clients leave, or whose steps fail."""

from __future__ import annotations

import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import openai
import pytest

from tests.helpers.engine_requests import is_idle
from tests.helpers.page_server import PageServer, until_idle
from tests.helpers.waiting import until


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_away_frees_its_pages(page_server: PageServer, stream: bool) -> None:
    page_server.model.gate = threading.Semaphore(0)
    try:
        body = {"model": "tiny", "prompt": [1, 2, 3], "max_tokens": 500, "ignore_eos": True, "stream": stream}
        before = page_server.model.steps
        page_server.model.gate.release(3)
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{page_server.url}/v1/completions", json=body, timeout=0.5)

        def idle() -> bool:
            """After one more step: when the server notices is its own affair."""
            assert page_server.model.gate is not None
            page_server.model.gate.release()
            time.sleep(0.02)
            return is_idle(page_server.engine)

        until(idle)
        assert page_server.model.steps - before < 250, "it did not go on to its end"
    finally:
        page_server.model.gate.release(10_000)
        page_server.model.gate = None


def test_a_failed_step_is_a_500_and_the_server_goes_on(page_server: PageServer, client: openai.OpenAI) -> None:
    until_idle(page_server)  # no step in flight that would fail in place of this request's
    page_server.model.fail_next = 1
    with pytest.raises(openai.InternalServerError) as failed:
        client.completions.create(model="tiny", prompt=[1], max_tokens=5)
    assert "step" in failed.value.message
    assert client.completions.create(model="tiny", prompt=[1], max_tokens=5).choices[0].text
    assert httpx.get(f"{page_server.url}/health").status_code == 200
    until_idle(page_server)


def test_a_stream_that_fails_says_so_and_ends(page_server: PageServer) -> None:
    until_idle(page_server)
    page_server.model.fail_next = 1
    body = {"model": "tiny", "prompt": [9, 9, 7], "stream": True}
    answer = httpx.post(f"{page_server.url}/v1/completions", json=body)
    assert answer.status_code == 200
    *_, error, done = [line for line in answer.text.split("\n") if line]
    assert json.loads(error.removeprefix("data: "))["error"]["code"] == "step_failed" and done == "data: [DONE]"


def test_health_tells_that_the_engine_is_dead() -> None:
    server = PageServer()
    server.start()
    try:
        assert httpx.get(f"{server.url}/health").json() == {"status": "ok"}
        server.engine.stop(5)
        assert httpx.get(f"{server.url}/health").status_code == 503
        body = {"model": "tiny", "prompt": "a"}
        assert httpx.post(f"{server.url}/v1/completions", json=body).status_code == 503
    finally:
        server.stop()


def test_a_full_queue_is_a_503_that_says_when_to_come_again(
    page_server: PageServer, client: openai.OpenAI, monkeypatch: pytest.MonkeyPatch
) -> None:
    body = {"model": "tiny", "prompt": ["a"] * 17, "n": 4}
    never = httpx.post(f"{page_server.url}/v1/completions", json=body)
    assert never.status_code == 400 and never.json()["error"]["param"] == "n", "more than the queue ever holds"
    with monkeypatch.context() as patch:
        patch.setattr(page_server.engine, "_num_unfinished", 1000)
        answer = httpx.post(f"{page_server.url}/v1/completions", json=body | {"prompt": "a", "n": 1})
    assert answer.status_code == 503 and answer.json()["error"]["code"] == "queue_full"
    assert int(answer.headers["retry-after"]) >= 1
    assert client.completions.create(model="tiny", prompt="a").choices[0].text, "none was taken"
    until_idle(page_server)


def test_a_request_that_takes_too_long(monkeypatch: pytest.MonkeyPatch) -> None:
    server = PageServer(request_timeout=0.2)
    server.start()
    step = server.model.step

    def slow(work: Any) -> Any:
        time.sleep(0.3)
        return step(work)

    monkeypatch.setattr(server.model, "step", slow)
    try:
        answer = httpx.post(f"{server.url}/v1/completions", json={"model": "tiny", "prompt": "a"})
        assert answer.status_code == 408 and answer.json()["error"]["code"] == "request_timeout"
    finally:
        server.stop()


def test_a_request_that_waits_too_long() -> None:
    """It comes while a step runs that takes longer."""
    server = PageServer(queue_timeout=0.4)
    server.start()
    server.model.gate = gate = threading.Semaphore(1)
    try:
        body = {"model": "tiny", "prompt": [1, 2], "max_tokens": 300, "ignore_eos": True}
        with ThreadPoolExecutor(2) as pool:
            runs = pool.submit(httpx.post, f"{server.url}/v1/completions", json=body, timeout=60)
            until(lambda: server.engine.status().steps == 1)
            waits = pool.submit(httpx.post, f"{server.url}/v1/completions", json=body, timeout=60)
            until(lambda: server.engine.status().waiting == 1)
            time.sleep(0.45)
            gate.release(10_000)
            answer = waits.result()
            assert answer.status_code == 503 and answer.json()["error"]["code"] == "queue_timeout"
            assert runs.result().status_code == 200
    finally:
        gate.release(10_000)
        server.stop()


class _Held:
    """Holds up whoever compiles a grammar, until released."""

    def __init__(self, server: PageServer, monkeypatch: pytest.MonkeyPatch) -> None:
        self.entered = threading.Semaphore(0)
        self.release = threading.Event()
        self.compiled = 0
        real = server.served.grammars.compile

        def compile(constraint: Any) -> Any:
            self.entered.release()
            assert self.release.wait(60)
            self.compiled += 1
            return real(constraint)

        monkeypatch.setattr(server.served.grammars, "compile", compile)


GUIDED = {"model": "tiny", "prompt": "a", "guided_choice": ["x"]}


def test_grammars_hold_up_only_requests_with_a_grammar(
    page_server: PageServer, client: openai.OpenAI, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More of them than there are threads in asyncio's pool. One whose client leaves is never compiled."""
    held, url = _Held(page_server, monkeypatch), f"{page_server.url}/v1/completions"
    monkeypatch.setattr(page_server.served.grammar_workers, "_max_queued", 38)
    with ThreadPoolExecutor(40) as clients:
        gone = httpx.Timeout(60, read=0.3)
        waiting = [clients.submit(httpx.post, url, json=GUIDED, timeout=60) for _ in range(8)]
        for _ in range(2):
            assert held.entered.acquire(timeout=30)
        until(lambda: page_server.served.grammar_workers._unfinished == 8)
        left = [clients.submit(httpx.post, url, json=GUIDED, timeout=gone) for _ in range(32)]
        for each in left:
            assert isinstance(each.exception(), httpx.ReadTimeout)
        assert client.completions.create(model="tiny", prompt="a").choices[0].text, "not held up"
        until(lambda: page_server.served.grammar_workers._unfinished == 8)
        monkeypatch.setattr(page_server.served.grammar_workers, "_max_queued", 6)
        full = httpx.post(url, json=GUIDED)
        assert full.status_code == 503 and full.json()["error"]["code"] == "queue_full"
        assert "6 requests wait for their grammars" in full.json()["error"]["message"] and full.headers["retry-after"]
        held.release.set()
        assert [each.result().json()["choices"][0]["text"] for each in waiting] == ["x"] * 8
    assert held.compiled == 8
    until_idle(page_server)


def test_the_time_limit_counts_from_the_arrival(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiling the grammar is part of it."""
    server = PageServer(request_timeout=0.3)
    server.start()
    held = _Held(server, monkeypatch)
    try:
        answer = httpx.post(f"{server.url}/v1/completions", json=GUIDED)
        assert answer.status_code == 408 and answer.json()["error"]["code"] == "request_timeout"
        assert "within 0.3 s: its preparation" in answer.json()["error"]["message"]
        assert held.compiled == 0, "it was told before"
        held.release.set()
        until(lambda: server.served.grammar_workers._unfinished == 0)
        assert httpx.post(f"{server.url}/v1/completions", json=GUIDED).json()["choices"][0]["text"] == "x"
        until_idle(server)
    finally:
        held.release.set()
        server.stop()
