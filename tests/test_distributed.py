"""Two processes over gloo on one mesh give what one process gives; a rank that is late kills nothing."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

ROOT = Path(__file__).parent.parent


def environment(**extra: str) -> dict[str, str]:
    return {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"} | extra


def run_processes(count: int, checkpoint: Path, out: Path) -> np.ndarray:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    command = [sys.executable, "-m", "tests.helpers.distributed_worker", address, str(count)]
    workers = [
        subprocess.Popen([*command, str(i), str(checkpoint), str(out)], cwd=ROOT, env=environment())
        for i in range(count)
    ]
    assert [worker.wait(timeout=300) for worker in workers] == [0] * count
    return np.load(out)


def test_two_processes_agree_with_one(checkpoint: Callable[[str], tuple[dict[str, Any], Path]], tmp_path: Path) -> None:
    path = checkpoint("v3")[1]
    one, two = (run_processes(count, path, tmp_path / f"{count}.npy") for count in (1, 2))
    assert one.shape[:2] == (2, 2)
    finite = np.isfinite(one)
    np.testing.assert_allclose(two[finite], one[finite], atol=1e-5 * np.abs(one[finite]).max(), rtol=0)


LATE_RANK = """
import time
from jax_mla_cp import platform
platform.setup("cpu", 2)
import jax, numpy as np
from jax.sharding import PartitionSpec as P
import jax_mla_cp as mla

def hold(one):
    time.sleep({seconds})
    return np.asarray(one)

def late(one):
    held = jax.pure_callback(hold, jax.ShapeDtypeStruct((), "float32"), one)
    return jax.lax.pcast(held, "cp", to="varying")

def run(rank):
    one = rank[0] * 0 + np.float32(1)
    return jax.lax.psum(jax.lax.cond(rank[0] == 0, late, lambda one: one, one), "cp")

ranks = np.arange(2, dtype=np.int32)
mesh = mla.make_mesh("cp=2")
print(float(jax.jit(jax.shard_map(run, mesh=mesh, in_specs=P("cp"), out_specs=P()))(ranks)))
"""


@pytest.mark.slow
def test_a_rank_may_be_60_seconds_late() -> None:
    done = subprocess.run(
        [sys.executable, "-c", LATE_RANK.format(seconds=60)],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip() == "2.0"


def test_xla_would_have_killed_it() -> None:
    """Negative control: with XLA's timeout at 3 s instead of an hour, a rank that is 15 s late ends the process."""
    call = "--xla_cpu_collective_call"  # XLA warns first, and waits for the second timeout after that
    flags = f"{call}_warn_stuck_timeout_seconds=1 {call}_terminate_timeout_seconds=3"
    done = subprocess.run(
        [sys.executable, "-c", LATE_RANK.format(seconds=15)],
        env=environment(XLA_FLAGS=flags),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode < 0, "killed by a signal, not by a Python error"
    assert "Traceback" not in done.stderr
