"""The other processes' side: they run what they are sent and echo it, and end when process 0 does, or a message is wrong."""

from __future__ import annotations

import dataclasses
import json
import queue
import socket
import threading
import time
import zlib
from typing import Any

import numpy as np
import pytest

from jax_mla_cp.batch.shapes import StepShape
from jax_mla_cp.batch.step_request import SamplingParams, StepRequest
from jax_mla_cp.config.errors import ConfigError
from jax_mla_cp.distributed import follower as follower_module
from jax_mla_cp.distributed import handshake
from jax_mla_cp.distributed.follower import Follower
from jax_mla_cp.distributed.step_message import ECHO, StepMessage, crc_of, encode, encode_shape
from jax_mla_cp.distributed.wire import Kind
from jax_mla_cp.step.inputs import StepInputs
from jax_mla_cp.step.planner import Planner
from jax_mla_cp.step.runner import Runner
from jax_mla_cp.step.sampling import SamplerOutput
from tests.helpers.fake_cluster import KEY, Coordination, Peer, cluster, following
from tests.helpers.synthetic import random_model
from tests.helpers.waiting import until

# A thread that ends the process raises SystemExit here.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")

PROGRAM = "0123456789abcdef"


@pytest.fixture(scope="module")
def planned() -> Runner:
    planner = Planner.create(random_model(), cache_tokens=64, page_size=16, max_requests=1)
    return Runner(planner, prefill_chunk=64, max_running=1, max_model_len=64)


@pytest.fixture
def inputs(planned: Runner) -> StepInputs:
    return planned.prepare([[StepRequest([1, 2, 3], 0, [0], SamplingParams())]])[1]


class FakeRunner:
    """Stands for a `Runner` whose programs all have one hash."""

    def __init__(self, planner: Planner):
        self.planner = planner
        self.compiled: list[StepShape] = []
        self.executed: list[StepInputs] = []
        self.error: Exception | None = None

    def fingerprint(self, shape: StepShape) -> str:
        self.compiled.append(shape)
        return PROGRAM

    def execute(self, inputs: StepInputs) -> SamplerOutput:
        if self.error:
            raise self.error
        self.executed.append(inputs)
        return SamplerOutput(None, None, None, None, table_checksum=np.array([len(self.executed)], np.uint32))


def run(follower: Follower, planned: Runner) -> tuple[FakeRunner, threading.Thread]:
    """Runs it on a thread, which ends with it."""
    runner = FakeRunner(planned.planner)
    thread = threading.Thread(target=follower.run, args=(runner,), daemon=True)
    thread.start()
    return runner, thread


def test_steps_are_executed_and_echoed(planned: Runner, inputs: StepInputs, monkeypatch: pytest.MonkeyPatch) -> None:
    with following(monkeypatch) as (follower, leader, codes):
        runner, _ = run(follower, planned)
        shape = planned.planner.step_shapes[-1]
        leader.wire.send(Kind.COMPILE, encode_shape(shape))
        for number in (1, 2):
            payload = encode(StepMessage(number, PROGRAM, inputs))
            leader.wire.send(Kind.STEP, payload)
            got, crc, table, seconds = ECHO.unpack(leader.next(Kind.ECHO)[1])
            assert (got, crc) == (number, zlib.crc32(payload)) and 0 <= seconds < 30
            assert table == crc_of(np.array([number], np.uint32)), "what its devices returned, not what it was sent"
        assert runner.compiled == [shape, inputs.shape, inputs.shape]
        assert [each.batch.rank_words.tolist() for each in runner.executed] == [inputs.batch.rank_words.tolist()] * 2
        assert codes.empty()


@pytest.mark.parametrize(
    ("number", "program", "said"),
    [
        (2, PROGRAM, "step 1 failed: step 2 after step 0."),
        (0, PROGRAM, "step 1 failed: step 0 after step 0."),
        (1, "fedcba9876543210", "step 1 failed: step 1 needs the program fedcba9876543210, this process has 01234567"),
    ],
    ids=["skipped", "repeated", "another program"],
)
def test_another_step_ends_it(
    number: int, program: str, said: str, planned: Runner, inputs: StepInputs, monkeypatch: pytest.MonkeyPatch
) -> None:
    with following(monkeypatch) as (follower, leader, codes):
        runner, thread = run(follower, planned)
        leader.wire.send(Kind.STEP, encode(StepMessage(number, program, inputs)))
        assert leader.next(Kind.FAILED)[1].decode().startswith(said)
        leader.wire.close()
        thread.join(30)
        assert codes.get() == 1 and not runner.executed


def test_a_message_that_is_none_ends_it(planned: Runner, inputs: StepInputs, monkeypatch: pytest.MonkeyPatch) -> None:
    shape = json.dumps(dataclasses.asdict(StepShape(5, 5, 5))).encode()
    for kind, payload in ((Kind.STEP, b"nonsense"), (Kind.COMPILE, b"[]"), (Kind.COMPILE, shape)):
        with following(monkeypatch) as (follower, leader, codes):
            runner, thread = run(follower, planned)
            leader.wire.send(kind, payload)
            assert b"step 1 failed: a s" in leader.next(Kind.FAILED)[1]
            leader.wire.close()
            thread.join(30)
            assert codes.get() == 1 and not runner.executed


def test_a_step_that_fails_is_reported(planned: Runner, inputs: StepInputs, monkeypatch: pytest.MonkeyPatch) -> None:
    """It ends when process 0 has told all and ended, or after a while."""
    monkeypatch.setattr(follower_module, "_LEADER_SECONDS", 0.5)
    with following(monkeypatch) as (follower, leader, codes):
        runner, thread = run(follower, planned)
        runner.error = MemoryError("no room")
        leader.wire.send(Kind.STEP, encode(StepMessage(1, PROGRAM, inputs)))
        assert leader.next(Kind.FAILED)[1] == b"step 1 failed: no room"
        thread.join(30)
        assert codes.get() == 1


def test_a_step_that_fails_because_process_0_is_gone_says_so(
    planned: Runner, inputs: StepInputs, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Its collectives may fail before its connection does."""
    monkeypatch.setattr(follower_module, "_CULPRIT_SECONDS", 30)
    with following(monkeypatch) as (follower, leader, codes):
        runner, _ = run(follower, planned)
        runner.error = ConnectionError("reset by peer")
        leader.wire.send(Kind.STEP, encode(StepMessage(1, PROGRAM, inputs)))
        until(lambda: "step 1 failed" in caplog.text)
        leader.wire.close()
        assert codes.get(timeout=30) == 1
    assert "this process ends, after step 0: process 0 (host-0) closed its connection" in caplog.text
    assert "this process ends: step 1 failed" not in caplog.text


def frame_of_another_crc(leader: Peer, inputs: StepInputs) -> None:
    payload = encode(StepMessage(1, PROGRAM, inputs))
    leader.wire.send(Kind.STEP, payload, crc=zlib.crc32(payload) ^ 1)


@pytest.mark.parametrize("how", ["crc", "noise", "kind"])
def test_a_corrupt_message_ends_it(
    how: str, planned: Runner, inputs: StepInputs, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with following(monkeypatch) as (follower, leader, codes):
        runner, _ = run(follower, planned)
        if how == "crc":
            frame_of_another_crc(leader, inputs)
        elif how == "noise":
            leader.wire._socket.sendall(bytes(100))
        else:
            leader.wire.send(Kind.ECHO, b"")
        assert codes.get(timeout=30) == 1
        assert not runner.executed
    assert "this process ends, after step 0: process 0 (host-0) sent a corrupt message: " in caplog.text


def test_it_ends_with_process_0(monkeypatch: pytest.MonkeyPatch) -> None:
    with following(monkeypatch) as (_, leader, codes):
        leader.wire.send(Kind.STOP)
        assert codes.get(timeout=30) == 0


def test_a_lost_process_0_ends_it(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    with following(monkeypatch) as (_, leader, codes):
        leader.wire.close()
        assert codes.get(timeout=30) == 1
    assert "this process ends, after step 0: process 0 (host-0) closed its connection" in caplog.text


def test_a_silent_process_0_ends_it(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    with following(monkeypatch, heartbeat_timeout=1, mute=True) as (_, _, codes):
        began = time.monotonic()
        assert codes.get(timeout=30) == 1
        assert 0.5 < time.monotonic() - began < 10
    assert "process 0 (host-0) has been silent for 1 s (--heartbeat-timeout 1)." in caplog.text


def test_what_process_0_says_ends_it(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    with following(monkeypatch) as (_, leader, codes):
        leader.wire.send(Kind.FAILED, b"process 2 (host-2) closed its connection")
        until(lambda: "the cluster ends: process 2 (host-2) closed its connection" in caplog.text)
        assert codes.empty(), "process 0 answers its clients first"
        leader.wire.close()
        assert codes.get(timeout=30) == 1
    assert "this process ends" not in caplog.text, "it is told once"


def test_a_signal_asks_process_0_to_drain(monkeypatch: pytest.MonkeyPatch) -> None:
    with following(monkeypatch) as (follower, leader, codes):
        follower.drain()
        leader.next(Kind.DRAIN)
        assert codes.empty(), "it goes on until process 0 says so"


def test_a_difference_that_all_find_is_told_by_each(monkeypatch: pytest.MonkeyPatch) -> None:
    """Process 0 ends first, and this one still has time to say why."""
    with following(monkeypatch) as (follower, leader, codes):

        def differ() -> None:
            with follower.expect_exit():
                leader.wire.close()
                assert follower._link.wait_closed(30)
                raise ValueError("differs")

        with pytest.raises(ValueError, match="differs"):
            differ()
        with pytest.raises(queue.Empty):
            codes.get(timeout=0.5)


def test_a_process_that_finds_no_difference_is_not_left_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(follower_module, "OWN_REASON_SECONDS", 0.2)
    with following(monkeypatch) as (follower, leader, codes), follower.expect_exit():
        leader.wire.close()
        assert codes.get(timeout=30) == 1


def test_what_cant_work_here_is_told_to_process_0(monkeypatch: pytest.MonkeyPatch) -> None:
    with following(monkeypatch) as (follower, leader, codes):

        def load() -> None:
            with follower.failing_all():
                raise ConfigError("model", "a file is missing.")

        thread = threading.Thread(target=load, daemon=True)
        thread.start()
        assert leader.next(Kind.REFUSED)[1] == b"model: a file is missing."
        assert codes.empty(), "it ends after process 0"
        leader.wire.close()
        thread.join(30)
        assert codes.get() == 2


@pytest.mark.parametrize("kind, code", [(Kind.FAILED, 1), (Kind.REFUSED, 2)])
def test_a_failure_is_no_clean_end(kind: Kind, code: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Process 0 tells of the end, too, if a drain was under way."""
    with following(monkeypatch) as (_, leader, codes):
        leader.wire.send(kind, b"process 2 (c): gone")
        leader.wire.send(Kind.STOP)
        with pytest.raises(queue.Empty):
            codes.get(timeout=0.5)
        leader.wire.close()
        assert codes.get(timeout=30) == code


def test_an_error_that_nobody_expected_ends_all(monkeypatch: pytest.MonkeyPatch) -> None:
    with following(monkeypatch) as (follower, leader, codes):

        def load() -> None:
            with follower.failing_all():
                raise MemoryError("no room")

        threading.Thread(target=load, daemon=True).start()
        assert leader.next(Kind.FAILED)[1] == b"MemoryError: no room"
        leader.wire.close()
        assert codes.get(timeout=30) == 1


def test_what_all_find_themselves_is_not_told(monkeypatch: pytest.MonkeyPatch) -> None:
    with following(monkeypatch) as (follower, leader, codes):

        def differ() -> None:
            with follower.failing_all(), follower.expect_exit():
                raise ConfigError("page_size", "must be the same in all processes.")

        with pytest.raises(ConfigError, match="must be the same"):
            differ()
        assert leader.received.empty() and codes.empty()


def connecting(key: bytes = KEY) -> Any:
    """A follower that looks for its leader, and what listens there."""
    service, listener = Coordination(2), socket.create_server(("127.0.0.1", 0))
    cluster(service, 0).store.publish("leader", str(listener.getsockname()[1]))
    return listener, lambda: Follower(cluster(service, 1), key)


def test_a_leader_with_another_key_is_refused() -> None:
    listener, connect = connecting(b"the key of another cluster")
    refused: list[ConfigError] = []

    def follow() -> None:
        with pytest.raises(ConfigError) as error:
            connect()
        refused.append(error.value)

    thread = threading.Thread(target=follow)
    thread.start()
    with listener, listener.accept()[0] as connection, pytest.raises(handshake.Refused):
        handshake.accept(connection, KEY)
    thread.join(30)
    assert refused[0].field == "cluster_key_file"
    assert refused[0].message.endswith("it refuses this process's key. All processes must have the same key.")


def test_a_leader_that_is_not_there_is_told() -> None:
    listener, connect = connecting()
    listener.close()
    with pytest.raises(ConfigError, match=r"coordinator: process 0 can't be reached at 127\.0\.0\.1:\d+: .*refused"):
        connect()
