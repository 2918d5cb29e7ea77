"""A process for each GPU, through NCCL: the server finds the passkeys as one process does, and ends when a process is lost."""

from __future__ import annotations

import signal
import time
from pathlib import Path
from typing import Any

import httpx
import jax
import pytest

from tests.helpers import passkeys
from tests.helpers.live import serving
from tests.helpers.processes import cluster
from tests.helpers.waiting import until


@pytest.mark.parametrize("mesh", ["cp=2", "tp=2"])
def test_two_processes_answer_as_one(mesh: str, tmp_path: Path) -> None:
    pytest.importorskip("fastapi", reason="the server's packages are not installed")
    if jax.device_count() < 2:
        pytest.skip(f"needs 2 GPUs, there are {jax.device_count()}")
    flags = ("--platform", "cuda", "--mesh", mesh, "--no-warmup", "--max-running", "8", "--prefill-chunk", "1024")
    prompts = passkeys.prompts()
    with serving(tmp_path / "one.log", flags) as live:
        one = passkeys.ask(live.url, prompts)
        live.wait_until_idle()
    own = {i: ("--local-devices", str(i)) for i in range(2)}
    with cluster(tmp_path, 2, *flags, own=own) as processes:
        url = processes.wait_until_ready()
        two = passkeys.ask(url, prompts)
        assert "FlashAttention-3" in processes.log(1)
        until(lambda: len({process["step"] for process in shown(url)}) == 1)
        assert [process["process"] for process in shown(url)] == [0, 1] and shown(url)[0]["step"] > 0
        began = time.monotonic()
        processes.send(1, signal.SIGKILL)
        assert processes.processes[0].wait(60) == 1
        assert time.monotonic() - began < 30
        assert "process 1" in processes.log(0)
    assert not passkeys.missed(prompts, one) and not passkeys.missed(prompts, two)


def shown(url: str) -> list[dict[str, Any]]:
    """The processes that /status shows."""
    found: list[dict[str, Any]] = httpx.get(f"{url}/status", timeout=30).json()["processes"]
    return found
