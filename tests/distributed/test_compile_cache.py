"""Several processes' compile caches: a second start compiles nothing, whether they share a folder or have one each."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.processes import environment

WORKER = """
import json, sys, threading
from pathlib import Path
import jax
from jax.sharding import NamedSharding, PartitionSpec
from jax_mla_cp.distributed.exit import exit_now
from jax_mla_cp.launch import LaunchOptions, set_up_devices
from jax_mla_cp.mesh import MeshShape

coordinator, process, directory, out = sys.argv[1:]
events = []
jax.monitoring.register_event_listener(lambda event, **_: events.append(event.rpartition("/")[2]))
options = LaunchOptions(
    mesh=MeshShape(tp=2), platform="cpu", compile_cache=directory, coordinator=coordinator, num_processes=2,
    process_id=int(process),
)
devices = set_up_devices(options)
sharding = NamedSharding(devices.mesh, PartitionSpec("tp"))
events.clear()
total = jax.jit(lambda: jax.lax.with_sharding_constraint(jax.numpy.arange(8.0), sharding).sum() * 3)()
Path(out).write_text(json.dumps([float(total), events.count("cache_hits"), events.count("compile_requests_use_cache")]))
devices.member.cluster.wait_for_all("the end")
if process == "0":
    devices.member.stop()
    exit_now(0)
threading.Event().wait()  # until process 0 ends it
"""


def start(folders: tuple[Path, Path], logs: Path) -> list[tuple[float, int, int]]:
    """A start of two processes: each one's result, programs found in the cache, and programs looked for."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        coordinator = f"127.0.0.1:{probe.getsockname()[1]}"
    outs = [logs / f"{i}.json" for i in range(2)]
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", WORKER, coordinator, str(i), str(folders[i]), str(outs[i])],
            env=environment(),
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(2)
    ]
    errors = [worker.communicate(timeout=120)[1] for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0], errors
    return [tuple(json.loads(out.read_text())) for out in outs]


def programs(folder: Path) -> int:
    return len(list(folder.glob("jit__lambda*-cache")))


@pytest.mark.parametrize("shared", [True, False])
def test_a_second_start_compiles_nothing(shared: bool, tmp_path: Path) -> None:
    folders = tmp_path / "0", tmp_path / ("0" if shared else "1")
    for (total, hits, wanted), folder in zip(start(folders, tmp_path), folders, strict=True):
        assert total == 84 and wanted >= 1 and hits == 0
        assert programs(folder) == (2 if shared else 1), "a program's key on CPU devices differs between processes"
    for total, hits, wanted in start(folders, tmp_path):
        assert total == 84 and hits == wanted >= 1
    assert not list(folders[0].glob(".shared-*")), "the probe is gone"
