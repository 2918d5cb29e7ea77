"""A cluster within the test's own process: its coordination service is a dictionary, its connections are real."""

from __future__ import annotations

import contextlib
import queue
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import NoReturn

import pytest

from jax_mla_cp.distributed import follower as follower_module
from jax_mla_cp.distributed import handshake
from jax_mla_cp.distributed import leader as leader_module
from jax_mla_cp.distributed.cluster import Cluster
from jax_mla_cp.distributed.cluster_options import ClusterOptions
from jax_mla_cp.distributed.follower import Follower
from jax_mla_cp.distributed.leader import Leader
from jax_mla_cp.distributed.link import Link
from jax_mla_cp.distributed.store import Store
from jax_mla_cp.distributed.wire import Kind, Wire

KEY = b"a key of this cluster, and of no other"
Message = tuple[Kind, bytes, int]


class Coordination:
    """Does for a `Store` what JAX's coordination service does."""

    def __init__(self, processes: int):
        self._processes = processes
        self._values: dict[str, str] = {}
        self._arrived: dict[str, int] = {}
        self._changed = threading.Condition()

    def key_value_set(self, key: str, value: str) -> None:
        with self._changed:
            assert key not in self._values, f"{key} is set twice"
            self._values[key] = value
            self._changed.notify_all()

    def blocking_key_value_get(self, key: str, milliseconds: int) -> str:
        with self._changed:
            if not self._changed.wait_for(lambda: key in self._values, milliseconds / 1000):
                raise RuntimeError(f"DEADLINE_EXCEEDED: {key}\nand more lines")
            return self._values[key]

    def wait_at_barrier(self, name: str, milliseconds: int) -> None:
        with self._changed:
            self._arrived[name] = self._arrived.get(name, 0) + 1
            self._changed.notify_all()
            assert self._changed.wait_for(lambda: self._arrived[name] == self._processes, milliseconds / 1000)


def cluster(service: Coordination, process: int, count: int = 2, heartbeat_timeout: float = 10) -> Cluster:
    """One process's view of a cluster on this machine. Process i is on a host named host-i."""
    options = ClusterOptions("127.0.0.1:1", count, process, heartbeat_timeout=heartbeat_timeout)
    hosts = tuple(f"host-{i}" for i in range(count))
    return Cluster(options, process, count, "127.0.0.1", hosts, hosts, Store(service, process, count))


def connected(follower: Cluster, key: bytes = KEY) -> socket.socket:
    """A follower's connection to the leader, after the handshake."""
    connection = socket.create_connection(("127.0.0.1", int(follower.store.read("leader", 0))), 30)
    handshake.connect(connection, key, follower.process_id)
    return connection


class Peer:
    """The test's end of a link. It keeps what it is sent; its heart beats unless it is `mute`."""

    def __init__(self, connection: socket.socket, *, mute: bool = False):
        self.wire = Wire(connection)
        self.received: queue.Queue[Message] = queue.Queue()
        self.lost = threading.Event()
        Link(
            self.wire,
            3600 if mute else 1,
            lambda kind, payload, crc: self.received.put((kind, bytes(payload), crc)),
            lambda reason: self.lost.set(),
        ).start()

    def next(self, kind: Kind) -> Message:
        """The next message, which must be of this kind."""
        message = self.received.get(timeout=30)
        assert message[0] is kind, message
        return message


@contextlib.contextmanager
def leading(
    monkeypatch: pytest.MonkeyPatch, *, followers: int = 1, heartbeat_timeout: float = 10, mute: bool = False
) -> Iterator[tuple[Leader, list[Peer], queue.Queue[str]]]:
    """A leader, its followers' ends, and the reasons for which it would have ended this process."""
    failures: queue.Queue[str] = queue.Queue()
    monkeypatch.setattr(leader_module, "_exit_on_failure", lambda reason, code: failures.put(reason))
    service, count = Coordination(followers + 1), followers + 1
    clusters = [cluster(service, i, count, heartbeat_timeout) for i in range(count)]
    with ThreadPoolExecutor(1) as pool:
        made = pool.submit(Leader, clusters[0], KEY)
        peers = [Peer(connected(each), mute=mute) for each in clusters[1:]]
        leader = made.result(60)
    try:
        yield leader, peers, failures
    finally:
        for peer in peers:
            peer.wire.close()
        leader.stop()


@contextlib.contextmanager
def following(
    monkeypatch: pytest.MonkeyPatch, *, heartbeat_timeout: float = 10, mute: bool = False
) -> Iterator[tuple[Follower, Peer, queue.Queue[int]]]:
    """A follower, its leader's end, and the codes with which it would have ended this process."""
    codes: queue.Queue[int] = queue.Queue()

    def exit_now(code: int) -> NoReturn:
        codes.put(code)
        raise SystemExit  # ends the thread

    monkeypatch.setattr(follower_module, "exit_now", exit_now)
    before = set(threading.enumerate())
    service = Coordination(2)
    with socket.create_server(("127.0.0.1", 0)) as listener, ThreadPoolExecutor(1) as pool:
        cluster(service, 0).store.publish("leader", str(listener.getsockname()[1]))
        made = pool.submit(Follower, cluster(service, 1, 2, heartbeat_timeout), KEY)
        connection, _ = listener.accept()
        assert handshake.accept(connection, KEY) == 1
        peer = Peer(connection, mute=mute)
        follower = made.result(60)
    try:
        yield follower, peer, codes
    finally:
        # Nothing of it may go on: the real `exit_now` is about to come back.
        follower._closing.set()
        peer.wire.close()
        follower._messages.put((Kind.STEP, memoryview(b""), 0))  # ends a `run` that waits
        for thread in set(threading.enumerate()) - before:
            if thread.name != "cluster-watch":
                thread.join(30)
