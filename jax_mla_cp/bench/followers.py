"""Stand-ins for the other processes of a cluster, on this host.

Their connections, messages and echoes are real; their steps do nothing.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import subprocess
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from jax_mla_cp.bench.bench_options import Options
from jax_mla_cp.config.errors import ConfigError
from jax_mla_cp.distributed.cluster import Cluster
from jax_mla_cp.distributed.cluster_options import ClusterOptions
from jax_mla_cp.distributed.handshake import KEY_VARIABLE
from jax_mla_cp.distributed.leader import Leader
from jax_mla_cp.distributed.store import Store

LOOPBACK = "127.0.0.1"
READY = "ready"


def loopback_cluster(process_id: int, processes: int, client: Any) -> Cluster:
    """Makes a cluster whose processes are all on this host.

    Args:
      client: stands in for the one of JAX's coordination service.
    """
    store = Store(client, process_id, processes)
    names = ("localhost",) * processes
    return Cluster(ClusterOptions(), process_id, processes, LOOPBACK, names, names, store)


@contextlib.contextmanager
def leading(options: Options) -> Iterator[Leader | None]:
    """Starts `options.processes` - 1 followers (bench/echo_process.py) for the steps of `host`, and connects them with this
    process. They end with the block, or with this process. Gives None for a process that is alone.

    Raises:
      ConfigError: a follower did not start; its standard error, which is this process's, says why.
    """
    if options.processes == 1:
        yield None
        return
    key = secrets.token_hex(32)
    with contextlib.ExitStack() as stack:
        children = [stack.enter_context(_started(i, options, key)) for i in range(1, options.processes)]
        for i, child in enumerate(children, 1):
            assert child.stdout is not None
            if child.stdout.readline().strip() != READY:
                raise ConfigError("processes", f"process {i} did not start. The lines above say why.")
        leader = Leader(loopback_cluster(0, options.processes, _Announcer(children)), key.encode())
        leader.on_failure = lambda reason, code: None  # the next step raises it, and its row fails
        try:
            yield leader
        finally:
            leader.stop()


class _Announcer:
    """Stands in for the client of JAX's coordination service: tells the followers what the leader publishes, its port."""

    def __init__(self, children: Sequence[subprocess.Popen[str]]):
        self._children = children

    def key_value_set(self, name: str, value: str) -> None:
        for child in self._children:
            print(value, file=child.stdin, flush=True)


@contextlib.contextmanager
def _started(process_id: int, options: Options, key: str) -> Iterator[subprocess.Popen[str]]:
    """Starts a follower, which is killed if it still runs at the end."""
    shapes = ",".join(f"{requests}x{context}" for requests, context in options.shapes)
    flags = ["--model", options.model, "--mesh", str(options.mesh), "--shapes", shapes]
    child = subprocess.Popen(
        [sys.executable, "-m", "jax_mla_cp.bench.echo_process", str(process_id), str(options.processes), *flags],
        env=os.environ | {KEY_VARIABLE: key},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,  # Ctrl-C is for this process, which ends it
    )
    with child:
        try:
            yield child
        finally:
            child.kill()
