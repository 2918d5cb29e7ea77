"""A server of two processes, one of which is killed, stopped or told to end; and what its clients and the other process see."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import re
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import httpx

from tests.helpers.live import wait_for
from tests.helpers.processes import Cluster, cluster

HEARTBEAT = 2
FLAGS = (
    *("--platform", "cpu", "--mesh", "tp=2,cp=2", "--heartbeat-timeout", str(HEARTBEAT)),
    *("--page-size", "16", "--kv-pages", "32", "--max-model-len", "256"),
    *("--prefill-chunk", "3", "--max-running", "2", "--drain-timeout", "120"),
)
"""One program for all steps. A prompt of `LONG` tokens takes 40."""
LONG = 120
MODEL = "jax-mla-cp-tiny"

Who = Literal["leader", "follower"]
When = Literal["at rest", "in a prefill", "in decode"]


@dataclasses.dataclass(frozen=True)
class Failure:
    """A signal to a process, and its moment."""

    signal: signal.Signals
    who: Who
    when: When

    def __str__(self) -> str:
        return f"{self.signal.name} of the {self.who} {self.when}"

    @property
    def victim(self) -> int:
        return 0 if self.who == "leader" else 1

    @property
    def other(self) -> int:
        return 1 - self.victim


@dataclasses.dataclass
class Seen:
    """A failure, seen from outside."""

    whole: httpx.Response | Exception | None
    """Answer of a running request; None: there was none."""
    events: list[dict[str, Any]] | Exception | None
    """Events of a running stream."""
    health: list[tuple[int, str]]
    """Status and body of /health from the signal on, without repetitions."""
    code: int
    """Exit code of the process that was let alone."""
    seconds: float
    """Until it had exited."""


def _body(tokens: int, prompt: int = 3) -> dict[str, Any]:
    return {
        "model": MODEL,
        "prompt": [300 + i * i % 97 for i in range(prompt)],
        "max_tokens": tokens,
        "temperature": 0,
        "ignore_eos": True,
    }


@contextlib.contextmanager
def failing_cluster(logs: Path, coordinator: str | None = None) -> Iterator[tuple[Cluster, str]]:
    """Two processes, and the server's address."""
    logs.mkdir(parents=True, exist_ok=True)
    with cluster(logs, 2, *FLAGS, coordinator=coordinator) as running:
        yield running, running.wait_until_ready()


def inflict(failure: Failure, running: Cluster, url: str) -> Seen:
    """Sends the signal, and waits until the other process has exited."""
    with ThreadPoolExecutor(3) as pool:
        whole, stream = _requests(failure, pool, url)
        began = time.monotonic()
        running.send(failure.victim, failure.signal)
        gone = threading.Event()
        health = pool.submit(_watch_health, url, gone)
        try:
            code = running.processes[failure.other].wait(120)
            seconds = time.monotonic() - began
        finally:
            gone.set()
            if failure.signal is signal.SIGSTOP and failure.who == "leader":
                running.send(0, signal.SIGKILL)  # its clients would wait for as long as they like
        return Seen(
            None if whole is None else whole.exception(120) or whole.result(),  # type: ignore[arg-type]
            None if stream is None else stream.exception(120) or stream.result(),  # type: ignore[arg-type]
            health.result(120),
            code,
            seconds,
        )


def _requests(
    failure: Failure, pool: ThreadPoolExecutor, url: str
) -> tuple[Future[httpx.Response] | None, Future[list[dict[str, Any]]] | None]:
    """Requests that are where the failure is to find them."""
    if failure.when == "at rest":
        return None, None
    # The first run of a program is compiled, and no place for this.
    assert httpx.post(f"{url}/v1/completions", json=_body(2), timeout=300).status_code == 200
    tokens = 24 if failure.signal is signal.SIGTERM else 200
    if failure.when == "in a prefill":
        whole = pool.submit(httpx.post, f"{url}/v1/completions", json=_body(4, prompt=LONG), timeout=300)
        wait_for(lambda: _prefilled(url), lambda done: 10 < done < LONG - 30, 60)
        return whole, None
    begun = threading.Event()
    whole = pool.submit(httpx.post, f"{url}/v1/completions", json=_body(tokens), timeout=300)
    stream = pool.submit(_stream, url, _body(tokens, prompt=4), begun)
    assert begun.wait(120)
    return whole, stream


def _prefilled(url: str) -> int:
    """Tokens of the prompt that is being prefilled."""
    prefill = httpx.get(f"{url}/status", timeout=30).json()["prefill"]
    prompts = [prompt for prompt in (prefill or {"prompts": []})["prompts"] if prompt["total"] == LONG]
    return int(prompts[-1]["done"]) if prompts else 0


def _stream(url: str, body: dict[str, Any], begun: threading.Event) -> list[dict[str, Any]]:
    events = []
    with httpx.stream("POST", f"{url}/v1/completions", json=body | {"stream": True}, timeout=300) as answer:
        assert answer.status_code == 200, answer.read()
        for line in answer.iter_lines():
            if line.startswith("data: {"):
                events.append(json.loads(line[6:]))
                begun.set()
    return events


def _watch_health(url: str, gone: threading.Event) -> list[tuple[int, str]]:
    seen: list[tuple[int, str]] = []
    while not gone.wait(0.02):
        with contextlib.suppress(httpx.TransportError):
            answer = httpx.get(f"{url}/health", timeout=5)
            now = answer.status_code, answer.text if answer.status_code != 200 else ""
            if not seen or seen[-1] != now:
                seen.append(now)
    return seen


def check(failure: Failure, seen: Seen, running: Cluster) -> None:
    """Holds what docs/several-hosts.md promises.

    Raises:
      AssertionError: something else happened.
    """
    if failure.signal is signal.SIGTERM:
        _check_drain(failure, seen, running)
        return
    stopped = failure.signal is signal.SIGSTOP
    if failure.who == "leader" and seen.code == -signal.SIGABRT:  # JAX noticed it first, and ends the process like that
        assert "JAX distributed service" in running.log(1), running.log(1)[-2000:]
        return
    assert seen.code == 1
    assert seen.seconds < (HEARTBEAT if stopped else 0) + 15
    assert not stopped or seen.seconds > HEARTBEAT / 2
    victim = rf"process {failure.victim} \([^)]+\)"
    why = rf"{victim} has been silent for \d+ s" if stopped else rf"{victim} closed its connection"
    log = running.log(failure.other)
    if failure.who == "leader":
        assert re.search(rf"this process ends, after step \d+: {why}", log), log[-2000:]
        return  # its clients lose their connections
    assert re.search(rf"the cluster ends: {why}.* Its last step was \d+\.", log), log[-2000:]
    assert any(status == 503 and re.search(why, text) for status, text in seen.health), seen.health
    assert failure.when == "at rest" or isinstance(seen.whole, httpx.Response), seen.whole
    if isinstance(seen.whole, httpx.Response):
        error = seen.whole.json()["error"]
        assert seen.whole.status_code == 500 and re.search(why, error["message"]), seen.whole.text
    if failure.when == "in decode":
        assert isinstance(seen.events, list), seen.events
        assert re.search(why, seen.events[-1]["error"]["message"]), seen.events[-1]
        assert len(seen.events) > 1 and all("error" not in event for event in seen.events[:-1])
    if stopped:  # when it runs again, it finds that the others are gone
        running.send(failure.victim, signal.SIGCONT)
        assert running.processes[failure.victim].wait(60) == 1


def _check_drain(failure: Failure, seen: Seen, running: Cluster) -> None:
    assert running.wait(60) == [0, 0], running.log(0)[-2000:] + running.log(1)[-2000:]
    if failure.when != "at rest":
        assert isinstance(seen.whole, httpx.Response) and seen.whole.status_code == 200, seen.whole
    if failure.when == "in decode":
        assert isinstance(seen.events, list) and seen.events[-1]["choices"][0]["finish_reason"] == "length"
    assert all(status == 200 for status, _ in seen.health), seen.health
    for i in range(2):
        assert "Traceback" not in running.log(i) and "the cluster ends" not in running.log(i)
        assert "this process ends" not in running.log(i)
    assert "stopped: process 0 has ended" in running.log(1)
