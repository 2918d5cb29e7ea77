"""Frames arrive as they were sent, and a change of any byte is noticed; who does not have the key is kept out."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import random
import secrets
import socket
import time
import zlib
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jax_mla_cp.config.errors import ConfigError
from jax_mla_cp.distributed import accept as accept_module
from jax_mla_cp.distributed import cluster as cluster_module
from jax_mla_cp.distributed import handshake, leader
from jax_mla_cp.distributed.handshake import Refused, accept, cluster_key, connect
from jax_mla_cp.distributed.leader import Leader
from jax_mla_cp.distributed.store import Store
from jax_mla_cp.distributed.wire import CorruptMessage, Kind, Wire
from tests.helpers.fake_cluster import KEY, Coordination, Peer, cluster, connected
from tests.helpers.waiting import until

OTHER_KEY = b"the key of another cluster"


@contextlib.contextmanager
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    """Two ends of a TCP connection."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        one = socket.create_connection(listener.getsockname())
        other, _ = listener.accept()
    with one, other:
        yield one, other


def frame(kind: Kind, payload: bytes) -> bytes:
    """The bytes of a message."""
    with pair() as (one, other):
        Wire(one).send(kind, payload)
        one.close()
        read = b""
        while more := other.recv(1 << 16):
            read += more
    return read


payloads = st.lists(st.tuples(st.sampled_from(Kind), st.binary(max_size=2000)), max_size=5)


@given(payloads)
@settings(deadline=None, max_examples=50)
def test_messages_arrive_as_they_were_sent(messages: list[tuple[Kind, bytes]]) -> None:
    with pair() as (one, other):
        for i, (kind, payload) in enumerate(messages):
            Wire(one).send(kind, memoryview(payload), zlib.crc32(payload) if i % 2 else None)
        receiver = Wire(other)
        for kind, payload in messages:
            got = receiver.receive()
            assert (got[0], bytes(got[1]), got[2]) == (kind, payload, zlib.crc32(payload))


def test_messages_of_many_threads_do_not_mix() -> None:
    sent = [bytes([i]) * (1 + 40_000 * (i % 5)) for i in range(40)]
    with pair() as (one, other), ThreadPoolExecutor(8) as pool:
        sender, receiver = Wire(one), Wire(other)
        done = pool.map(lambda payload: sender.send(Kind.STEP, payload), sent)
        got = [bytes(receiver.receive()[1]) for _ in sent]
        list(done)
    assert sorted(got) == sorted(sent)


@given(st.sampled_from(Kind), st.binary(min_size=1, max_size=200), st.data())
@settings(deadline=None, max_examples=200)
def test_any_changed_byte_is_noticed(kind: Kind, payload: bytes, data: st.DataObject) -> None:
    """In the payload and in the header: also one that would make another kind, or a shorter message."""
    whole = bytearray(frame(kind, payload))
    at = data.draw(st.integers(0, len(whole) - 1), label="place")
    whole[at] ^= data.draw(st.integers(1, 255), label="change")
    with pair() as (one, other):
        one.sendall(whole)
        one.shutdown(socket.SHUT_WR)
        with pytest.raises(CorruptMessage):
            Wire(other).receive()


@given(st.sampled_from(Kind), st.binary(max_size=200))
@settings(deadline=None, max_examples=50)
def test_unchanged_bytes_are_read(kind: Kind, payload: bytes) -> None:
    """Negative control of the test above."""
    with pair() as (one, other):
        one.sendall(frame(kind, payload))
        one.shutdown(socket.SHUT_WR)
        receiver = Wire(other)
        assert bytes(receiver.receive()[1]) == payload
        with pytest.raises(ConnectionError, match="closed"):
            receiver.receive()


@given(st.binary(min_size=1, max_size=200))
@settings(deadline=None, max_examples=50)
def test_other_bytes_are_no_message(noise: bytes) -> None:
    with pair() as (one, other):
        one.sendall(noise)
        one.shutdown(socket.SHUT_WR)
        with pytest.raises((CorruptMessage, ConnectionError)):
            Wire(other).receive()


def test_a_closed_connection_ends_both_sides() -> None:
    with pair() as (one, other), ThreadPoolExecutor(2) as pool:
        sender, receiver = Wire(one), Wire(other)
        waiting = [pool.submit(wire.receive) for wire in (sender, receiver)]
        sender.close()
        for each in waiting:
            assert isinstance(each.exception(30), OSError)
        with pytest.raises(OSError):
            sender.send(Kind.HEARTBEAT)
        sender.close()  # once more harms nothing


def test_a_message_cut_off_is_a_closed_connection() -> None:
    whole = frame(Kind.STEP, bytes(100))
    with pair() as (one, other):
        one.sendall(whole[:-1])
        one.close()
        with pytest.raises(ConnectionError, match="closed"):
            Wire(other).receive()


def shake(leaders_key: bytes, followers_key: bytes, process: int = 3) -> tuple[Future[int], Future[None]]:
    """Both sides of a handshake. Each closes its connection when it fails, as `Leader` and `Follower` do."""
    with pair() as (one, other), ThreadPoolExecutor(2) as pool:

        def leader() -> int:
            with one:
                return accept(one, leaders_key)

        def follower() -> None:
            with other:
                connect(other, followers_key, process)

        return pool.submit(leader), pool.submit(follower)


def test_who_has_the_key_is_accepted() -> None:
    leader, follower = shake(KEY, KEY)
    assert leader.result(30) == 3
    assert follower.result(30) is None


def test_a_follower_with_another_key_is_refused() -> None:
    leader, follower = shake(KEY, OTHER_KEY)
    with pytest.raises(Refused, match="does not have this cluster's key"):
        leader.result(30)
    with pytest.raises(Refused, match="refuses this process's key"):
        follower.result(30)


def test_a_leader_without_the_key_is_refused() -> None:
    """It takes any follower's proof, and can't answer with its own; nor is the follower's own proof one."""
    for proof in (bytes(32), secrets.token_bytes(32), None):
        with pair() as (one, other), ThreadPoolExecutor(1) as pool:
            follower = pool.submit(connect, other, KEY, 1)
            one.sendall(bytes(32))
            answer = Wire(one)._exactly(4 + 32 + 32)
            one.sendall(bytes(answer[-32:]) if proof is None else proof)
            with pytest.raises(Refused, match="does not have this cluster's key"):
                follower.result(30)


def test_a_recorded_proof_is_worth_nothing() -> None:
    """A stranger heard a whole handshake, and says the same again."""
    with pair() as (leader_end, tap_one), pair() as (tap_two, follower_end), ThreadPoolExecutor(2) as pool:
        leader, follower = pool.submit(accept, leader_end, KEY), pool.submit(connect, follower_end, KEY, 1)
        tap_two.sendall(tap_one.recv(32, socket.MSG_WAITALL))
        heard = tap_two.recv(68, socket.MSG_WAITALL)
        tap_one.sendall(heard)
        tap_two.sendall(tap_one.recv(32, socket.MSG_WAITALL))
        assert leader.result(30) == 1 and follower.result(30) is None
    with pair() as (leader_end, stranger), ThreadPoolExecutor(1) as pool:
        leader = pool.submit(accept, leader_end, KEY)
        stranger.sendall(heard)
        with pytest.raises(Refused):
            leader.result(30)


def test_another_process_id_than_the_proof_says_is_refused() -> None:
    with pair() as (leader_end, tap_one), pair() as (tap_two, follower_end), ThreadPoolExecutor(2) as pool:
        leader, follower = pool.submit(accept, leader_end, KEY), pool.submit(connect, follower_end, KEY, 1)
        tap_two.sendall(tap_one.recv(32, socket.MSG_WAITALL))
        heard = tap_two.recv(68, socket.MSG_WAITALL)
        tap_one.sendall((2).to_bytes(4, "little") + heard[4:])
        with pytest.raises(Refused):
            leader.result(30)
        tap_two.close()
        with pytest.raises(Refused):
            follower.result(30)


@given(st.binary(max_size=300))
@settings(deadline=None, max_examples=50)
def test_noise_is_refused(noise: bytes) -> None:
    with pair() as (leader_end, stranger), ThreadPoolExecutor(1) as pool:
        leader = pool.submit(accept, leader_end, KEY)
        stranger.sendall(noise)
        stranger.shutdown(socket.SHUT_WR)
        assert isinstance(leader.exception(30), Refused | ConnectionError)


@pytest.mark.parametrize("side", ["leader", "follower"])
def test_a_handshake_ends_in_time(side: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever says nothing, or a byte now and then, does not hold it."""
    monkeypatch.setattr(handshake, "_SECONDS", 0.5)
    for trickles in (False, True):
        with pair() as (one, other), ThreadPoolExecutor(1) as pool:
            began = time.monotonic()
            run = pool.submit(accept, one, KEY) if side == "leader" else pool.submit(connect, one, KEY, 1)  # type: ignore[arg-type]
            while trickles and not run.done():
                with contextlib.suppress(OSError):
                    other.sendall(b"x")
                time.sleep(0.05)
            assert isinstance(run.exception(30), TimeoutError)
            assert 0.4 < time.monotonic() - began < 5


def test_strangers_change_nothing(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are refused and logged; the cluster's own follower is accepted beside them, and after them."""
    monkeypatch.setattr(handshake, "_SECONDS", 1.0)
    monkeypatch.setattr(leader, "_exit_on_failure", lambda reason, code: None)
    service = Coordination(3)
    rng = random.Random(0)
    with caplog.at_level(logging.WARNING), ThreadPoolExecutor(1) as pool, contextlib.ExitStack() as stack:
        made = pool.submit(Leader, cluster(service, 0, 3), KEY)
        follower = cluster(service, 1, 3)
        port = int(follower.store.read("leader", 0))

        def stranger(said: bytes) -> socket.socket:
            connection = stack.enter_context(socket.create_connection(("127.0.0.1", port), 30))
            connection.sendall(said)
            return connection

        silent = [stranger(b"") for _ in range(3)]
        loud = [stranger(rng.randbytes(rng.choice([1, 20, 68, 500]))) for _ in range(10)]
        loud.append(stranger(b"GET / HTTP/1.1\r\nHost: leader\r\n\r\n" * 3))
        for key, process in ((OTHER_KEY, 1), (KEY, 7), (KEY, 0)):
            with contextlib.suppress(Refused), stack.enter_context(socket.create_connection(("127.0.0.1", port))) as s:
                connect(s, key, process)
        first = Peer(connected(follower))  # beside the silent ones
        with contextlib.suppress(Refused):
            stack.enter_context(connected(follower))  # a process comes once
        until(lambda: sum("refused a connection" in record.getMessage() for record in caplog.records) == 18)
        assert not made.done(), "strangers don't count"
        for connection in (*silent, *loud):
            connection.settimeout(30)
            with contextlib.suppress(ConnectionError):
                while connection.recv(1 << 16):
                    pass  # its end: the leader has closed it
        second = Peer(connected(cluster(service, 2, 3)))
        led = made.result(30)
        assert [p.process for p in led.processes] == [0, 1, 2]
        assert led._links.keys() == {1, 2} and led._failure is None
        for peer in (first, second):
            peer.wire.close()
        led.stop()
    told = [record.getMessage() for record in caplog.records if "refused" in record.getMessage()]
    assert sum(line.startswith("refused a connection from 127.0.0.1: ") for line in told) == 15
    assert any("does not have this cluster's key" in line for line in told)
    for process in (7, 0, 1):
        assert f"refused a connection: it says that it is process {process}, which is not expected." in told
    assert any("longer than 1 s" in line or "timed out" in line for line in told)


def test_a_follower_that_never_comes_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accept_module, "_CONNECT_SECONDS", 0.5)
    with pytest.raises(
        ConfigError, match=r"coordinator: process 1 \(host-1\), process 2 \(host-2\) did not connect to"
    ):
        Leader(cluster(Coordination(3), 0, 3), KEY)


def test_an_address_that_is_not_process_0s_is_told() -> None:
    elsewhere = dataclasses.replace(
        cluster(Coordination(2), 0), coordinator_host="192.0.2.1"
    )  # a documentation's, nobody's
    with pytest.raises(ConfigError, match=r"can't listen on 192\.0\.2\.1: .*an address of process 0's own host"):
        accept_module.accept_followers(elsewhere, KEY)


@pytest.mark.parametrize("name, warned", [("node1", True), ("localhost", False), ("127.0.0.1", False)])
def test_a_name_that_others_cant_reach_is_told(
    name: str, warned: bool, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A host's own name is often 127.0.1.1 in its /etc/hosts."""
    address = name if name[0].isdigit() else "127.0.1.1"
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: [(0, 0, 0, "", (address, 0))])
    cluster_module._warn_if_loopback(name)
    assert ("node1 is 127.0.1.1 on this host" in caplog.text) == warned


def test_the_key_is_the_files_the_environments_or_the_leaders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    service = Coordination(2)
    stores = [Store(service, i, 2) for i in range(2)]
    monkeypatch.delenv(handshake.KEY_VARIABLE, raising=False)
    made = [cluster_key(None, store, i) for i, store in enumerate(stores)]
    assert made[0] == made[1] and len(made[0]) == 64
    assert cluster_key(None, Store(Coordination(2), 0, 2), 0) != made[0], "each start makes its own"
    monkeypatch.setenv(handshake.KEY_VARIABLE, "the environment's key")
    assert cluster_key(None, stores[1], 1) == b"the environment's key"
    file = tmp_path / "key"
    file.write_text("  the key of the file\nand a second line\n")
    assert cluster_key(file, stores[1], 1) == b"the key of the file"


@pytest.mark.parametrize("content", ["", "\n", "fifteen letters"])
def test_a_short_key_is_refused(content: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, store = tmp_path / "key", Store(Coordination(1), 0, 1)
    file.write_text(content)
    with pytest.raises(
        ConfigError, match=r"cluster_key_file: .*must hold at least 16 characters.*openssl rand -hex 32"
    ):
        cluster_key(file, store, 0)
    monkeypatch.setenv(handshake.KEY_VARIABLE, "short")
    with pytest.raises(ConfigError, match=rf"the variable {handshake.KEY_VARIABLE} must hold at least 16 .*, got 5"):
        cluster_key(None, store, 0)
    file.unlink()
    with pytest.raises(ConfigError, match=r"cluster_key_file: .*can't be read"):
        cluster_key(file, store, 0)
