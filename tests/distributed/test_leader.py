"""Process 0's side: it notices a follower that is lost, silent, stuck or wrong, and says which; a whole one costs nothing."""

from __future__ import annotations

import queue
import re
import threading
import time
import zlib
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from jax_mla_cp.batch.shapes import StepShape
from jax_mla_cp.distributed import leader as leader_module
from jax_mla_cp.distributed import leading_runner as leading_runner_module
from jax_mla_cp.distributed.leader import ClusterFailed, Leader
from jax_mla_cp.distributed.leading_runner import LeadingRunner
from jax_mla_cp.distributed.step_message import ECHO, StepMessage, crc_of
from jax_mla_cp.distributed.wire import Kind
from jax_mla_cp.step.inputs import StepInputs
from tests.helpers.fake_cluster import Peer, leading
from tests.helpers.waiting import until

SHAPE = StepShape(16, 16, 0)


def message(number: int) -> StepMessage:
    words = np.arange(number, number + 64, dtype=np.int32)
    batch: Any = SimpleNamespace(rank_words=words, group_words=words[:32], embeds=None)
    return StepMessage(number, "0123456789abcdef", StepInputs(SHAPE, batch, None, None, checksum_of(number)))


def checksum_of(number: int) -> np.ndarray:
    """The checksums of the page tables of two dp groups in a step."""
    return np.array([number, 7 * number], np.uint32)


def echo(peer: Peer, number: int, crc: int, seconds: float = 0.25, table: int | None = None) -> None:
    """`table`: the step whose page table was used, if it is another."""
    used = crc_of(checksum_of(number if table is None else table))
    peer.wire.send(Kind.ECHO, ECHO.pack(number, crc, used, seconds))


def run_step(leader: Leader, peers: list[Peer], *, first_run: bool = False) -> list[tuple[bytes, int]]:
    """A step that process 0 has finished; returns what each follower was sent."""
    with leader.step(message, first_run=first_run):
        return [peer.next(Kind.STEP)[1:] for peer in peers]


def test_steps_are_sent_and_echoed(monkeypatch: pytest.MonkeyPatch) -> None:
    with leading(monkeypatch, followers=2) as (leader, peers, failures):
        leader.watchdog = 1
        for number in (1, 2, 3):
            sent = run_step(leader, peers)
            assert sent[0] == sent[1] and f'"step": {number}'.encode() in sent[0][0]
            for peer, (payload, crc) in zip(peers, sent, strict=True):
                assert crc == zlib.crc32(payload)
                echo(peer, number, crc)
        until(lambda: [p.step for p in leader.processes] == [3, 3, 3])
        first, *others = leader.processes
        assert (first.process, first.host, first.heartbeat_age) == (0, "host-0", 0)
        assert [(p.process, p.host, p.step_seconds) for p in others] == [(1, "host-1", 0.25), (2, "host-2", 0.25)]
        assert all(0 <= p.heartbeat_age < 10 for p in others)
        with pytest.raises(queue.Empty):  # longer than the watchdog: nobody is behind
            failures.get(timeout=1.5)


@pytest.mark.parametrize(
    ("number", "change"), [(1, 1), (2, 0), (0, 0)], ids=["another CRC", "another step", "an old step"]
)
def test_a_wrong_echo_ends_the_cluster(number: int, change: int, monkeypatch: pytest.MonkeyPatch) -> None:
    with leading(monkeypatch, followers=2) as (leader, peers, failures):
        (_, crc), _ = run_step(leader, peers)
        echo(peers[0], number, crc ^ change)
        reason = failures.get(timeout=30)
        assert reason == (
            f"process 1 (host-1) has executed another step than it was sent: it echoes step {number}, CRC {crc ^ change:08x}."
        )
        for peer in peers:
            assert peer.next(Kind.FAILED)[1].decode() == reason, "all are told"
        with pytest.raises(ClusterFailed, match="process 1"), leader.step(message, first_run=False):
            raise AssertionError("no step begins any more")


def test_another_page_table_ends_the_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its number and CRC are right: the process has received what it was sent, and its devices had something else."""
    with leading(monkeypatch, followers=2) as (leader, peers, failures):
        for number in (1, 2):
            sent = run_step(leader, peers)
            echo(peers[1], number, sent[1][1])
            echo(peers[0], number, sent[0][1], table=1)
        reason = failures.get(timeout=30)
        assert reason == "process 1 (host-1) has run step 2 with another page table than the host's."
        assert peers[1].next(Kind.FAILED)[1].decode() == reason


def test_an_echo_of_no_step_ends_the_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    with leading(monkeypatch) as (_, peers, failures):
        echo(peers[0], 1, 0)
        assert "process 1 (host-1) has executed another step" in failures.get(timeout=30)


def test_a_repeated_echo_ends_the_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    with leading(monkeypatch) as (leader, peers, failures):
        ((_, crc),) = run_step(leader, peers)
        echo(peers[0], 1, crc)
        echo(peers[0], 1, crc)
        assert "process 1 (host-1) has executed another step" in failures.get(timeout=30)


@pytest.mark.parametrize(
    ("noise", "said"),
    [
        (b"GET / HTTP/1.1\r\nHost: leader\r\n\r\n", "process 1 (host-1) sent a corrupt message: a frame begins with"),
        (None, "process 1 (host-1) sent a corrupt message: a STEP message of 3 bytes, which a follower does not send."),
    ],
)
def test_a_corrupt_message_ends_the_cluster(noise: bytes | None, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with leading(monkeypatch, followers=2) as (_, peers, failures):
        if noise is None:
            peers[0].wire.send(Kind.STEP, b"abc")
        else:
            peers[0].wire._socket.sendall(noise)
        reason = failures.get(timeout=30)
        assert reason.startswith(said) and reason.endswith("Its last step was 0.")
        assert peers[1].next(Kind.FAILED)[1].decode() == reason


def test_a_lost_follower_is_named(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    with leading(monkeypatch, followers=2) as (leader, peers, failures):
        for peer, (_, crc) in zip(peers, run_step(leader, peers), strict=True):
            echo(peer, 1, crc)
        until(lambda: [p.step for p in leader.processes] == [1, 1, 1])
        peers[1].wire.close()
        reason = failures.get(timeout=30)
        assert reason == "process 2 (host-2) closed its connection: it has ended or was killed. Its last step was 1."
        assert f"the cluster ends: {reason}" in caplog.text
        assert failures.empty(), "once"


def test_a_failure_that_a_follower_reports_is_told_to_all(monkeypatch: pytest.MonkeyPatch) -> None:
    with leading(monkeypatch, followers=2) as (_, peers, failures):
        peers[0].wire.send(Kind.FAILED, "step 7 failed: out of memory \N{SKULL}".encode())
        reason = "process 1 (host-1): step 7 failed: out of memory \N{SKULL}"
        assert failures.get(timeout=30) == reason
        assert peers[1].next(Kind.FAILED)[1].decode() == reason


def test_a_silent_follower_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its connection stays open, as that of a machine that hangs."""
    with leading(monkeypatch, heartbeat_timeout=1, mute=True) as (_, _, failures):
        began = time.monotonic()
        reason = failures.get(timeout=30)
        assert reason == ("process 1 (host-1) has been silent for 1 s (--heartbeat-timeout 1). Its last step was 0.")
        assert 0.5 < time.monotonic() - began < 10


def test_a_heart_that_beats_is_not_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control."""
    with leading(monkeypatch, heartbeat_timeout=1) as (_, _, failures), pytest.raises(queue.Empty):
        failures.get(timeout=3)


def test_a_stuck_follower_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """It hangs on its GPU, and its heart beats."""
    with leading(monkeypatch, followers=2, heartbeat_timeout=1) as (leader, peers, failures):
        leader.watchdog = 1
        sent = run_step(leader, peers)
        echo(peers[1], 1, sent[1][1])
        began = time.monotonic()
        reason = failures.get(timeout=30)
        assert 0.5 < time.monotonic() - began < 10
        assert reason == "step 1 has been running for 1 s (--watchdog 1): process 1 (host-1) not done."


def test_a_step_that_hangs_everywhere_names_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its failure comes while process 0 is inside of it."""
    with leading(monkeypatch) as (leader, _, failures):
        leader.watchdog = 1
        with pytest.raises(ClusterFailed, match="--watchdog 1"), leader.step(message, first_run=False):
            reason = failures.get(timeout=30)
        assert reason.endswith("(--watchdog 1): process 0 (host-0), process 1 (host-1) not done.")


def test_a_programs_first_run_may_not_take_forever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leader_module, "_FIRST_RUN", 2)
    with leading(monkeypatch) as (leader, peers, failures):
        leader.watchdog = 1
        run_step(leader, peers, first_run=True)
        reason = failures.get(timeout=30)
        assert re.match(
            r"step 1 has been running for 2 s \(--watchdog 1, .* first run .*\): process 1 \(host-1\) not done\.",
            reason,
        )


def test_a_programs_first_run_may_take_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    with leading(monkeypatch) as (leader, peers, failures):
        leader.watchdog = 1
        ((_, crc),) = run_step(leader, peers, first_run=True)
        with pytest.raises(queue.Empty):
            failures.get(timeout=2.5)
        echo(peers[0], 1, crc)
        run_step(leader, peers)  # and the next one may not
        assert failures.get(timeout=30).startswith("step 2 has been running for 1 s")


def test_a_step_that_fails_here_ends_the_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leader_module, "_CULPRIT_SECONDS", 0.1)
    with leading(monkeypatch) as (leader, peers, failures):
        with pytest.raises(ClusterFailed), leader.step(message, first_run=False):
            raise MemoryError("no room")
        reason = failures.get(timeout=30)
        assert reason == "step 1 failed on process 0 (host-0): MemoryError: no room"
        peers[0].next(Kind.STEP)
        assert peers[0].next(Kind.FAILED)[1].decode() == reason


def test_a_step_that_fails_since_a_process_is_gone_names_that_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """A collective's own error says nothing of who."""
    with leading(monkeypatch, followers=2) as (leader, peers, failures):

        def step() -> None:
            with leader.step(message, first_run=False):
                threading.Timer(0.2, peers[1].wire.close).start()
                raise RuntimeError("Gloo: connection reset by peer")

        with pytest.raises(ClusterFailed, match="process 2"):
            step()
        assert failures.get(timeout=30).startswith("process 2 (host-2) closed its connection")


def test_a_followers_signal_drains_all(monkeypatch: pytest.MonkeyPatch) -> None:
    with leading(monkeypatch, followers=2) as (leader, peers, failures):
        asked: queue.Queue[str] = queue.Queue()
        leader.on_drain = asked.put
        peers[1].wire.send(Kind.DRAIN)
        assert asked.get(timeout=30) == "process 2 (host-2)"
        assert failures.empty()


def test_the_end_of_all_is_no_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    with leading(monkeypatch, followers=2) as (leader, peers, failures):
        stopping = threading.Thread(target=leader.stop)
        stopping.start()
        for peer in peers:
            peer.next(Kind.STOP)
            assert stopping.is_alive(), "it waits for them to end"
            peer.wire.close()
        stopping.join(30)
        assert not stopping.is_alive() and failures.empty()


def test_a_follower_that_does_not_end_is_waited_for_in_vain(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(leader_module, "_STOP_SECONDS", 0.3)
    with leading(monkeypatch, followers=2) as (leader, peers, failures):
        codes: queue.Queue[int] = queue.Queue()
        threading.Thread(target=lambda: codes.put(leader.stop()), daemon=True).start()
        peers[0].next(Kind.STOP)
        peers[0].wire.close()
        assert codes.get(timeout=30) == 0 and failures.empty()
        assert "process 2 (host-2) has not ended within 0.3 s" in caplog.text
        assert "process 1 (host-1) has not ended" not in caplog.text


def test_a_failure_before_the_end_is_not_a_clean_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """A drain goes on when a process is killed: its requests fail, so that there is nothing left to drain."""
    with leading(monkeypatch, followers=2) as (leader, peers, failures):
        peers[0].wire.close()
        failures.get(timeout=30)
        assert leader.stop() == 1
        assert peers[1].next(Kind.FAILED)
        with pytest.raises(queue.Empty):
            peers[1].received.get(timeout=0.5)


@pytest.mark.parametrize("kind, code", [(Kind.FAILED, 1), (Kind.REFUSED, 2)])
def test_a_setting_that_cant_work_has_its_own_code(kind: Kind, code: int, monkeypatch: pytest.MonkeyPatch) -> None:
    with leading(monkeypatch, followers=2) as (leader, peers, failures):
        peers[0].wire.send(kind, b"--kv-pages: too many.")
        assert failures.get(timeout=30) == "process 1 (host-1): --kv-pages: too many."
        assert peers[1].next(kind)
        assert leader.stop() == code


def test_exits_that_are_expected_are_no_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    """A difference ends all: each process finds it itself."""
    with leading(monkeypatch) as (leader, peers, failures):

        def differ() -> None:
            with leader.expect_exit():
                peers[0].wire.close()
                assert leader._links[1].wait_closed(30)
                raise ValueError("differs")

        with pytest.raises(ValueError, match="differs"):
            differ()
        with pytest.raises(queue.Empty):
            failures.get(timeout=0.5)


def test_a_process_that_finds_no_difference_is_not_left_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leader_module, "OWN_REASON_SECONDS", 0.2)
    with leading(monkeypatch) as (leader, peers, failures), leader.expect_exit():
        peers[0].wire.close()
        assert "process 1 (host-1) closed its connection" in failures.get(timeout=30)


def test_a_follower_that_is_silent_meanwhile_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    with leading(monkeypatch, heartbeat_timeout=1, mute=True) as (leader, _, failures), leader.expect_exit():
        assert failures.get(timeout=30).startswith("process 1 (host-1) has been silent for 1 s")


class FakeRunner:
    """Stands for a `Runner`: requests are numbers, a step's output is their sum."""

    prefill_chunk, max_running, dp, draft_tokens, page_size, pages_per_group, compiling = 64, 4, 1, 0, 16, 8, None

    def __init__(self) -> None:
        self.planner = SimpleNamespace(shape=None)
        self.compiled: list[StepShape] = []
        self.executed: list[StepInputs] = []
        self.used: list[int] | None = None
        """Checksums of the page tables that the steps use, if they are others."""

    def prepare(self, groups: Any) -> tuple[Any, StepInputs]:
        if groups == [["too long"]]:
            raise ValueError("request 0: it doesn't fit.")
        return "layout", message(len(self.executed) + 1).inputs

    def is_compiled(self, shape: StepShape) -> bool:
        return shape in self.compiled

    def fingerprint(self, shape: StepShape) -> str:
        self.compiled.append(shape)
        return "0123456789abcdef"

    def execute(self, inputs: StepInputs) -> Any:
        self.executed.append(inputs)
        return SimpleNamespace(table_checksum=self.used or inputs.table_checksum)


def test_the_engines_steps_go_to_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leading_runner_module, "read_results", lambda *given: given)
    fake = FakeRunner()
    with leading(monkeypatch, followers=2) as (leader, peers, failures):
        runner: Any = LeadingRunner(fake, leader)  # type: ignore[arg-type]
        assert (runner.dp, runner.page_size, runner.pages_per_group, runner.max_running) == (1, 16, 8, 4)
        with pytest.raises(ValueError, match="doesn't fit"):
            runner.step([["too long"]])
        for _ in range(2):
            assert runner.step([[]])[1:] == ("layout", None)
        for peer in peers:
            kinds = [peer.received.get(timeout=30)[0] for _ in range(3)]
            assert kinds == [Kind.COMPILE, Kind.STEP, Kind.STEP], (
                "a new program is announced; what was refused is not sent"
            )
        assert len(fake.executed) == 2 and failures.empty()
        with pytest.raises(ClusterFailed):
            runner.reset()


def test_a_step_with_another_page_table_here_ends_the_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeRunner()
    fake.used = [1, 8]
    with leading(monkeypatch) as (leader, _, failures):
        runner: Any = LeadingRunner(fake, leader)  # type: ignore[arg-type]
        with pytest.raises(ClusterFailed):
            runner.step([[]])
        assert (
            "step 1 failed on process 0 (host-0): PageTableLost: the page table of dp group 1 is not"
            in failures.get(timeout=30)
        )
