"""The server as several processes: process 0 serves HTTP and leads, the others follow. docs/several-hosts.md."""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from types import FrameType

from jax_mla_cp.distributed.exit import exit_now
from jax_mla_cp.distributed.follower import Follower
from jax_mla_cp.distributed.leader import Leader
from jax_mla_cp.engine import Engine
from jax_mla_cp.launch import Devices, set_up_devices
from jax_mla_cp.serve.lifecycle import Server
from jax_mla_cp.serve.loading import load
from jax_mla_cp.serve.server_options import ServerOptions

log = logging.getLogger(__name__)

_ANSWER_SECONDS = 2.0
"""Time for clients to be told of a failure, and for /health to be asked, before the process exits."""
_SIGNALS = (signal.SIGINT, signal.SIGTERM)


def lead(devices: Devices) -> Leader | None:
    """Process 0's side of the cluster, from now on told to end by signals. None: there are no other processes."""
    leader = devices.member
    if leader is None:
        return None
    assert isinstance(leader, Leader)
    for number in _SIGNALS:
        signal.signal(number, lambda number, frame: leader.stop_all("process 0 was told to end"))
    return leader


def serve_together(leader: Leader, engine: Engine, server: Server, watchdog: float | None) -> None:
    """Ties process 0's server to the cluster: a failure ends both at once, a drain of any process drains both."""

    def fail(reason: str) -> None:
        engine.abandon(reason)
        time.sleep(_ANSWER_SECONDS)
        exit_now(1)

    def drain(process: str) -> None:
        server.begin_drain()

    leader.on_failure, leader.on_drain, leader.watchdog = fail, drain, watchdog


def follow(config: ServerOptions) -> None:
    """Runs a follower until process 0 ends it. Never returns.

    Raises:
      ConfigError: as `set_up_devices` and `load`.
    """
    devices = set_up_devices(config)
    follower = devices.member
    assert isinstance(follower, Follower)
    asked = threading.Event()

    def drain(number: int, frame: FrameType | None) -> None:
        if asked.is_set():
            os.write(2, b"\nstopped by a second signal.\n")
            os._exit(1)
        asked.set()
        follower.drain()

    for number in _SIGNALS:
        signal.signal(number, drain)
    with follower.failing_all():
        loaded = load(config, devices)
    follower.cluster.wait_for_all("ready")
    log.info("ready: following %s", follower.cluster.name(0))
    follower.run(loaded.runner)
