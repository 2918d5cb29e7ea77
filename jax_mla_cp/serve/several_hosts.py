"""The server as several processes: process 0 serves HTTP and leads, the others follow. docs/several-hosts.md."""

from __future__ import annotations

import logging
import os
import time
from typing import NoReturn

from jax_mla_cp.cli import in_flags
from jax_mla_cp.config.errors import ConfigError
from jax_mla_cp.distributed.exit import exit_now
from jax_mla_cp.distributed.follower import Follower
from jax_mla_cp.distributed.leader import Leader
from jax_mla_cp.distributed.member import Member
from jax_mla_cp.distributed.signals import SignalThread
from jax_mla_cp.engine import Engine
from jax_mla_cp.launch import set_up_devices
from jax_mla_cp.serve.lifecycle import Server
from jax_mla_cp.serve.loading import load
from jax_mla_cp.serve.server_flags import make_parser
from jax_mla_cp.serve.server_options import ServerOptions

log = logging.getLogger(__name__)

_ANSWER_SECONDS = 2.0
"""Time for clients to be told of a failure, and for /health to be asked, before the process exits."""


def drain_on_signal(member: Member, signals: SignalThread) -> None:
    """From now on, a signal to this process drains all processes, and a second one ends it."""

    def second() -> None:
        os.write(2, b"\nstopped by a second signal.\n")
        os._exit(1)

    def first() -> None:
        signals.action = second
        member.drain()

    signals.action = first


def serve_together(leader: Leader, engine: Engine, server: Server, watchdog: float | None) -> None:
    """Ties process 0's server to the cluster: a failure ends both at once, a drain of any process drains both."""

    def fail(reason: str, code: int) -> None:
        try:
            engine.abandon(reason)
            time.sleep(_ANSWER_SECONDS)
        finally:
            exit_now(code)

    def drain(process: str) -> None:
        server.begin_drain()

    leader.on_failure, leader.on_drain, leader.watchdog = fail, drain, watchdog
    engine.on_death = leader.fail_here


def follow(config: ServerOptions, signals: SignalThread) -> NoReturn:
    """Runs a follower until process 0 ends it.

    Raises:
      ConfigError: as `set_up_devices`, or of a setting that all processes find.
    """
    devices = set_up_devices(config, lambda member: drain_on_signal(member, signals))
    follower = devices.member
    assert isinstance(follower, Follower)
    with follower.failing_all(describe):
        loaded = load(config, devices)
        follower.cluster.wait_for_all("ready")
    log.info("ready: following %s", follower.cluster.name(0))
    follower.run(loaded.runner)


def describe(error: ConfigError) -> str:
    """An error in the server's flags."""
    return in_flags(error, make_parser())
