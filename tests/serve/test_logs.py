"""Request ids, and the log's lines."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import queue
import re
import sys
import threading
import time
from collections.abc import Iterator

import httpx
import pytest

from jax_mla_cp.engine import Failed, Finished
from jax_mla_cp.serve import logs
from jax_mla_cp.serve.middleware import MiddlewareStack
from jax_mla_cp.serve.security import ApiKeys
from tests.helpers.echo_server import BODY, Running, running

SECRET = "the-key-0123456789"


@contextlib.contextmanager
def logged(
    capfd: pytest.CaptureFixture[str], form: str, middleware: MiddlewareStack | None = None
) -> Iterator[tuple[Running, list[str]]]:
    """A server and, once it has ended, the lines of its log."""
    lines: list[str] = []
    with logs.to_stderr("info", form), running(middleware) as server:
        yield server, lines
    lines += [line for line in capfd.readouterr().err.splitlines() if "request" in line]


def test_request_ids(capfd: pytest.CaptureFixture[str]) -> None:
    with logged(capfd, "json") as (server, lines):
        for given in ("mine-1.2_3", "a" * 64):
            assert httpx.get(f"{server.url}/version", headers={"x-request-id": given}).headers["x-request-id"] == given
        made = set()
        for given in ("a" * 65, "a b", "a\tb", "é", '"}', ""):
            headers = {"x-request-id": given.encode("latin-1")}
            made.add(httpx.get(f"{server.url}/version", headers=headers).headers["x-request-id"])
        assert len(made) == 6 and all(re.fullmatch("[0-9a-f]{24}", one) for one in made)
        for path in ("/nothing", "/v1/completions"):  # errors have one too
            assert httpx.get(server.url + path).headers["x-request-id"]
    ids = [json.loads(line)["id"] for line in lines]
    assert ids[0] == "mine-1.2_3" and made < set(ids) and len(ids) == 10


def test_a_json_line_has_what_is_known(capfd: pytest.CaptureFixture[str]) -> None:
    with logged(capfd, "json") as (server, lines):
        assert httpx.post(f"{server.url}/v1/completions", json={**BODY, "prompt": ["Hello", "Hi"]}).status_code == 200
        httpx.post(f"{server.url}/v1/completions", json={**BODY, "stream": True})
        httpx.post(f"{server.url}/v1/completions", json={})
        httpx.get(f"{server.url}/health")
    whole, streamed, bad = map(json.loads, lines)
    assert (whole["method"], whole["path"], whole["status"]) == ("POST", "/v1/completions", 200)
    assert (whole["prompt_tokens"], whole["output_tokens"], whole["cached_tokens"]) == (9, 6, 0)
    assert whole["finish"] == streamed["finish"] == "length"
    assert 0 <= whole["queue_s"] <= whole["ttft_s"] <= whole["total_s"] < 30
    assert streamed["output_tokens"] == 3 and whole["level"] == "info"
    assert bad["status"] == 400 and "prompt_tokens" not in bad


def test_a_line_tells_what_was_reused_and_why_it_failed(capfd: pytest.CaptureFixture[str]) -> None:
    with logged(capfd, "json") as (server, lines):
        server.engine.ends = [Finished("stop", "", cached_tokens=4), Failed("too late", "timeout")]
        for status in (200, 408):
            assert httpx.post(f"{server.url}/v1/completions", json=BODY).status_code == status
    reused, failed = map(json.loads, lines)
    assert (reused["cached_tokens"], reused["finish"]) == (4, "stop")
    assert (failed["finish"], failed["status"]) == ("timeout", 408)


def test_a_client_that_goes_away_is_an_abort(capfd: pytest.CaptureFixture[str]) -> None:
    with logged(capfd, "json") as (server, lines):
        server.engine.gate = threading.Semaphore(1)
        with httpx.stream("POST", f"{server.url}/v1/completions", json={**BODY, "stream": True}) as answer:
            next(answer.iter_lines())
    (line,) = map(json.loads, lines)
    assert (line["finish"], line["output_tokens"], line["status"]) == ("abort", 1, 200)


def test_content_is_logged_only_when_asked_for(capfd: pytest.CaptureFixture[str]) -> None:
    headers = {"authorization": f"Bearer {SECRET}"}
    for content in (False, True):
        with logged(capfd, "text", MiddlewareStack(ApiKeys([SECRET]), log_content=content)) as (server, lines):
            body = {**BODY, "prompt": "private words"}
            assert httpx.post(f"{server.url}/v1/completions?q=zzz", json=body, headers=headers).status_code == 200
            httpx.post(f"{server.url}/v1/completions", json={**body, "model": ["private"]}, headers=headers)
        assert len(lines) == 2
        assert ("private" in "".join(lines)) == ("output=" in lines[0]) == content
        assert (json.dumps(json.dumps(body, separators=(",", ":"))) in lines[0]) == content
        assert SECRET not in "".join(lines) and "zzz" not in "".join(lines)


def test_a_client_cant_write_lines_of_its_own(capfd: pytest.CaptureFixture[str]) -> None:
    for form in ("text", "json"):
        with logged(capfd, form) as (server, lines):
            httpx.get(f"{server.url}/%0a2026-01-01%20INFO%20request%20forged%1b[2J{'x' * 500}")
        (line,) = lines
        assert line.isprintable() and len(line) < 500 and r"\n2026" in line.replace("\\\\", "\\")


def test_what_nobody_expected_is_a_500_and_one_traceback(capfd: pytest.CaptureFixture[str]) -> None:
    with logs.to_stderr("info", "json"), running() as server:
        server.engine.refuse = ZeroDivisionError("private")
        answer = httpx.post(f"{server.url}/v1/completions", json=BODY, headers={"x-request-id": "broken-1"})
        assert answer.status_code == 500 and answer.headers["x-request-id"] == "broken-1"
        assert "private" not in answer.text and answer.json()["error"]["type"] == "server_error"
        server.engine.refuse = None
        assert httpx.post(f"{server.url}/v1/completions", json=BODY).status_code == 200
    lines = [json.loads(line) for line in capfd.readouterr().err.splitlines()]
    (error,) = [line for line in lines if "exception" in line]
    assert "broken-1" in error["message"] and "ZeroDivisionError" in error["exception"]


def test_a_log_that_nobody_reads_holds_up_nobody() -> None:
    """A full pipe: lines are dropped, counted and told."""
    front = logs._Queue(queue.Queue(3))
    record = logging.LogRecord("a", logging.INFO, "", 0, "line %d", (1,), None)
    started = time.monotonic()
    for _ in range(10):
        front.handle(record)
    assert time.monotonic() - started < 1 and front.dropped == 7
    assert front.queue.get_nowait().getMessage() == "line 1"
    front.handle(record)
    front.queue.get_nowait()
    front.queue.get_nowait()
    assert front.queue.get_nowait().getMessage() == "line 1 (7 log lines before this one were dropped)"
    assert record.args == (1,), "other handlers get theirs as it was"


def test_the_log_is_written_by_a_thread_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    writers: set[int] = set()

    class Terminal(io.StringIO):
        def write(self, text: str) -> int:
            writers.add(threading.get_ident())
            return super().write(text)

    monkeypatch.setattr(sys, "stderr", Terminal())
    with logs.to_stderr("info", "text"):
        logging.getLogger("jax_mla_cp.x").info("a line")
    assert writers and threading.get_ident() not in writers
