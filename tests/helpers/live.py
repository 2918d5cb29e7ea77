"""A server process for tests from outside: what it says of itself, and what the system says of it."""

from __future__ import annotations

import contextlib
import re
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx
import psutil

from tests.helpers.processes import server, url_of

PAGE, CHUNK, RUNNING = 64, 512, 64
"""The shared server's tokens of a page, prompt tokens of a step, and requests at a time."""
FLAGS = (
    "--mesh",
    "tp=2,cp=2",
    "--max-model-len",
    "9216",
    "--kv-pages",
    "1200",
    "--prefill-chunk",
    str(CHUNK),
    "--max-running",
    str(RUNNING),
    "--page-size",
    str(PAGE),
)
"""Room for a prompt of 8K, or 64 of 1200 tokens: four devices hold 2.8 GB of cache."""


class Live:
    """A running server."""

    def __init__(self, process: subprocess.Popen[str], url: str, log: Path):
        self.process = process
        self.url = url
        """Without /v1."""
        self._log = log
        self._system = psutil.Process(process.pid)
        self.model: str = httpx.get(f"{url}/v1/models", timeout=30).json()["data"][0]["id"]

    def status(self) -> dict[str, Any]:
        """The engine's part of GET /status."""
        answer = httpx.get(f"{self.url}/status", timeout=30)
        assert answer.status_code == 200, answer.text
        found: dict[str, Any] = answer.json()
        return found

    def log(self) -> str:
        """Its log, in one line."""
        return " ".join(self._log.read_text(errors="replace").split())

    def compiled(self) -> list[str]:
        """The shapes of the programs that it has compiled, one after the other."""
        return re.findall(r"compiled (StepShape\([^)]*\))", self.log())

    def programs(self) -> int:
        """Number of programs in its bucket grid."""
        match = re.search(r"(\d+) programs", self.log())
        assert match, self.log()
        return int(match[1])

    def resident(self) -> int:
        """Bytes of memory."""
        return int(self._system.memory_info().rss)

    def wait_until_idle(self, seconds: float = 60) -> dict[str, Any]:
        """Its status, once nothing waits or runs and every page has been given back."""
        return wait_for(self.status, _is_idle, seconds)

    def stop(self, number: int = signal.SIGTERM, seconds: float = 90) -> int:
        """Its exit code."""
        self.process.send_signal(number)
        return self.process.wait(seconds)


def _is_idle(status: dict[str, Any]) -> bool:
    pages = status["pages"]
    return (
        not (status["waiting"] or status["running"] or pages["used"])
        and pages["free"] + pages["cached"] == pages["total"]
    )


def wait_for(look: Callable[[], Any], good: Callable[[Any], bool], seconds: float) -> Any:
    """Observations when it is good."""
    deadline = time.monotonic() + seconds
    while not good(seen := look()):
        assert time.monotonic() < deadline, f"after {seconds} s still {seen}"
        time.sleep(0.1)
    return seen


@contextlib.contextmanager
def serving(log: Path, flags: Sequence[str] = FLAGS) -> Iterator[Live]:
    """A server with the built-in model, its log in a file. It must have ended cleanly, if not ended by the test."""
    with log.open("w") as errors, server("--log-level", "debug", *flags, errors=errors) as process:
        live = Live(process, url_of(process, log), log)
        yield live
        if process.poll() is None:
            assert live.stop() == 0, log.read_text()[-5000:]
    assert "Traceback" not in log.read_text()
