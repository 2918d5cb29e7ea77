"""The side of the other processes: executes the steps that process 0 sends, and echoes them."""

from __future__ import annotations

import logging
import queue
import socket
import threading
import time
from typing import NoReturn, Protocol

from jax_mla_cp.batch.shapes import StepShape
from jax_mla_cp.config.errors import ConfigError
from jax_mla_cp.distributed import handshake
from jax_mla_cp.distributed.cluster import Cluster
from jax_mla_cp.distributed.exit import FAILED, INVALID, Unreachable, exit_now
from jax_mla_cp.distributed.link import Link
from jax_mla_cp.distributed.member import OWN_REASON_SECONDS, Member
from jax_mla_cp.distributed.step_message import ECHO, StepDecoder, crc_of
from jax_mla_cp.distributed.wire import CorruptMessage, Kind, Wire
from jax_mla_cp.step.inputs import StepInputs
from jax_mla_cp.step.planner import Planner
from jax_mla_cp.step.sampling import SamplerOutput

log = logging.getLogger(__name__)

_CONNECT_SECONDS = 60.0
_POLL = 0.2
_CULPRIT_SECONDS = 1.0
"""Time that a failed step waits for process 0 to be gone, or to tell who is to blame; shorter than process 0's own."""
_LEADER_SECONDS = 15.0
"""Time for process 0 to end before this process, when a failure ends all."""


class Executor(Protocol):
    """The part of `jax_mla_cp.step.runner.Runner` that a follower needs."""

    planner: Planner

    def fingerprint(self, shape: StepShape, /) -> str: ...

    def execute(self, inputs: StepInputs, /) -> SamplerOutput: ...


class Follower(Member):
    """The connection to process 0. It ends this process when process 0 does, in whatever this process is doing.

    Raises:
      ConfigError: process 0 can't be reached, or has another key.
    """

    def __init__(self, cluster: Cluster, key: bytes):
        super().__init__(cluster)
        self._timeout = cluster.options.heartbeat_timeout
        self._messages: queue.SimpleQueue[tuple[Kind, memoryview, int]] = queue.SimpleQueue()
        """Steps and programs, in order."""
        self._last_step = 0
        self._closing = threading.Event()
        self._link = Link(Wire(self._connect(key)), self._timeout, self._on_message, self._on_lost)
        self._link.start()
        threading.Thread(target=self._watch, name="cluster-watch", daemon=True).start()

    def run(self, runner: Executor) -> NoReturn:
        """Executes steps until process 0 ends this process."""
        decoder = StepDecoder(runner.planner)
        while True:
            kind, payload, crc = self._messages.get()
            began = time.monotonic()
            try:
                if kind is Kind.COMPILE:
                    runner.fingerprint(decoder.decode_shape(payload))
                    continue
                message = decoder.decode(payload)
                number = message.number
                if number != self._last_step + 1:
                    raise CorruptMessage(f"step {number} after step {self._last_step}.")
                if (mine := runner.fingerprint(message.inputs.shape)) != message.program:
                    raise CorruptMessage(f"step {number} needs the program {message.program}, this process has {mine}.")
                table = crc_of(runner.execute(message.inputs).table_checksum)
            except Exception as error:
                log.exception("step %d failed", self._last_step + 1)
                # A collective fails when a process is gone; the connection to process 0, or process 0, tells which.
                if self._closing.wait(_CULPRIT_SECONDS):
                    threading.Event().wait()  # until another thread has ended this process
                self.fail_here(f"step {self._last_step + 1} failed: {error}")
            self._last_step = number
            self._link.send(Kind.ECHO, ECHO.pack(number, crc, table, time.monotonic() - began))

    def fail_here(self, reason: str, code: int = FAILED) -> NoReturn:
        self._closing.set()
        log.error("this process ends: %s", reason)
        self._link.send(Kind.REFUSED if code == INVALID else Kind.FAILED, reason.encode())
        self._exit_after_leader(code)

    def drain(self) -> None:
        threading.Thread(target=self._link.send, args=(Kind.DRAIN,), daemon=True).start()

    def _connect(self, key: bytes) -> socket.socket:
        host, port = self.cluster.coordinator_host, int(self.cluster.store.read("leader", 0))
        try:
            connection = socket.create_connection((host, port), _CONNECT_SECONDS)
            handshake.connect(connection, key, self.cluster.process_id)
        except handshake.Refused as error:
            raise ConfigError(
                "cluster_key_file", f"process 0 at {host}:{port}: {error} All processes must have the same key."
            ) from error
        except OSError as error:
            raise Unreachable(
                "coordinator", f"process 0 can't be reached at {host}:{port}: {error}. Is the port open to this host?"
            ) from error
        return connection

    def _on_message(self, kind: Kind, payload: memoryview, crc: int) -> None:
        if kind in (Kind.STEP, Kind.COMPILE):
            self._messages.put((kind, payload, crc))
        elif kind is Kind.STOP:
            if not self._closing.is_set():  # otherwise a failure was first
                log.info("stopped: process 0 has ended, after step %d", self._last_step)
                exit_now(0)
        elif kind in (Kind.FAILED, Kind.REFUSED):
            # Process 0 answers its clients first. A process that is started again sooner would meet its coordination service.
            if not self._closing.is_set():
                self._closing.set()
                log.error("the cluster ends: %s", bytes(payload).decode(errors="replace"))
            code = INVALID if kind is Kind.REFUSED else FAILED
            threading.Thread(target=self._exit_after_leader, args=(code,), daemon=True).start()
        else:
            raise CorruptMessage(f"a {kind.name} message, which process 0 does not send.")

    def _on_lost(self, reason: str) -> None:
        if self._expecting.is_set():
            time.sleep(OWN_REASON_SECONDS)
        self._end(f"{self.cluster.name(0)} {reason}")

    def _watch(self) -> None:
        while True:
            time.sleep(_POLL)
            if self._link.silence > self._timeout and not self._link.is_closed:
                self._end(
                    f"{self.cluster.name(0)} has been silent for {self._link.silence:.0f} s (--heartbeat-timeout {self._timeout:g})."
                )

    def _exit_after_leader(self, code: int) -> NoReturn:
        self._link.wait_closed(_LEADER_SECONDS)
        exit_now(code)

    def _end(self, reason: str) -> None:
        if self._closing.is_set():
            return
        self._closing.set()
        log.error("this process ends, after step %d: %s", self._last_step, reason)
        exit_now(FAILED)
