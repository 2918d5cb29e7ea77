"""Process 0's side of a cluster: accepts the followers, sends them each step, and watches over all."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import socket
import threading
import time
import zlib
from collections.abc import Callable, Iterator

from jax_mla_cp.batch.shapes import StepShape
from jax_mla_cp.distributed.accept import accept_followers
from jax_mla_cp.distributed.cluster import Cluster
from jax_mla_cp.distributed.exit import FAILED, INVALID, exit_now
from jax_mla_cp.distributed.link import Link
from jax_mla_cp.distributed.member import OWN_REASON_SECONDS, Member
from jax_mla_cp.distributed.step_message import ECHO, StepMessage, crc_of, encode, encode_shape
from jax_mla_cp.distributed.wire import CorruptMessage, Kind, Wire
from jax_mla_cp.step.errors import RunnerFailed

log = logging.getLogger(__name__)

_POLL = 0.2
_STOP_SECONDS = 10.0
_FIRST_RUN = 10
"""Times the watchdog that the first run of a program may take, which compiles it."""
_CULPRIT_SECONDS = 2.0
"""Time that a failed step waits for the connection of the process that is to blame to break."""
_TELL_SECONDS = 0.5
"""Time for the reason to reach the other processes."""


class ClusterFailed(RunnerFailed):
    """A process is lost, stuck or wrong."""


@dataclasses.dataclass(frozen=True)
class ProcessStatus:
    """A process of the cluster, as its leader sees it."""

    process: int
    host: str
    heartbeat_age: float
    """Seconds since its last message; 0 for the leader."""
    step: int
    """Its last step; 0: none yet."""
    step_seconds: float
    """Duration of that step."""


@dataclasses.dataclass
class _Progress:
    """A process's last step."""

    step: int = 0
    seconds: float = 0.0


@dataclasses.dataclass(frozen=True)
class _SentStep:
    """A step that not all processes have finished."""

    crc: int | None
    """CRC-32 of its message; None: the message is being made."""
    table: int | None
    """`crc_of` its page table's checksums; None: as `crc`."""
    began: float
    first_run: bool
    """Its program is compiled in it, which may take minutes."""


class Leader(Member):
    """Process 0's connections. Thread-safe.

    Raises:
      ConfigError: as `accept_followers`.
    """

    def __init__(self, cluster: Cluster, key: bytes):
        super().__init__(cluster)
        self.watchdog: float | None = None
        """Seconds that a step may take; ten times as long if it is a program's first run, which compiles it. None: any time."""
        self._timeout = cluster.options.heartbeat_timeout
        self._lock = threading.Lock()
        self._failure: str | None = None
        self._code = 0
        self._failed = threading.Event()
        self._closing = threading.Event()
        self._sent: dict[int, _SentStep] = {}
        self._progress = [_Progress() for _ in range(cluster.num_processes)]
        self.on_failure: Callable[[str, int], None] = _exit_on_failure
        """Called once, on a thread of its own, with the reason and the exit code: it must end the process."""
        self.on_drain: Callable[[str], None] = self._stop_all
        """Called with the name of a process that has been told to end."""
        self._links = {i: self._link(i, connection) for i, connection in accept_followers(cluster, key).items()}
        for link in self._links.values():
            link.start()
        threading.Thread(target=self._watch, name="cluster-watch", daemon=True).start()

    @property
    def processes(self) -> list[ProcessStatus]:
        """All processes, process 0 first."""
        return [
            ProcessStatus(
                i,
                self.cluster.hosts[i],
                self._links[i].silence if i in self._links else 0.0,
                progress.step,
                progress.seconds,
            )
            for i, progress in enumerate(self._progress)
        ]

    def announce(self, shape: StepShape) -> None:
        """Has all followers compile the program of the next step."""
        payload = encode_shape(shape)
        for link in self._links.values():
            link.send(Kind.COMPILE, payload)

    @contextlib.contextmanager
    def step(self, make: Callable[[int], StepMessage], *, first_run: bool) -> Iterator[None]:
        """Sends the step that `make` makes for its number, and counts it as done at the end of the block.

        Raises:
          ClusterFailed: the step or an earlier one failed, here or elsewhere. The cluster ends.
        """
        self._check()
        number = self._progress[0].step + 1
        step = _SentStep(None, None, time.monotonic(), first_run)
        with self._lock:
            self._sent[number] = step
        try:
            message = make(number)
            payload, table = encode(message), crc_of(message.inputs.table_checksum)
            crc = zlib.crc32(payload)
            with self._lock:
                self._sent[number] = dataclasses.replace(step, crc=crc, table=table)
            for link in self._links.values():
                link.send(Kind.STEP, payload, crc)
            yield
        except Exception as error:
            log.exception("step %d failed", number)
            # A collective fails when a process is gone; its connection tells which.
            self._failed.wait(_CULPRIT_SECONDS)
            self.fail(f"step {number} failed on {self.cluster.name(0)}: {type(error).__name__}: {error}")
            raise ClusterFailed(self._failure) from error
        self._check()
        self._finished(0, _Progress(number, time.monotonic() - step.began))

    def fail(self, reason: str, code: int = FAILED) -> None:
        """Ends the cluster: the first reason is logged, told to all processes and given to `on_failure`."""
        with self._lock:
            if self._failure is not None or self._closing.is_set():
                return
            self._failure, self._code = reason, code
        log.error("the cluster ends: %s", reason)
        for link in self._links.values():  # on threads: a process that hangs does not read
            kind = Kind.REFUSED if code == INVALID else Kind.FAILED
            threading.Thread(target=link.send, args=(kind, reason.encode()), daemon=True).start()
        self._failed.set()
        threading.Thread(target=self.on_failure, args=(reason, code), name="cluster-failed").start()

    def fail_here(self, reason: str, code: int = FAILED) -> None:
        self.fail(f"{self.cluster.name(0)}: {reason}", code)

    def stop(self) -> int:
        """Tells all followers that the steps are over, and waits for them to end. After a failure, of which they have been told, it
        does nothing.

        Returns:
          The exit code: 0, or the failure's.
        """
        with self._lock:
            if self._failure is not None:
                return self._code
            self._closing.set()
        for link in self._links.values():
            threading.Thread(target=link.send, args=(Kind.STOP,), daemon=True).start()
        until = time.monotonic() + _STOP_SECONDS
        for process, link in self._links.items():
            if not link.wait_closed(max(0.0, until - time.monotonic())):
                log.warning("%s has not ended within %g s", self.cluster.name(process), _STOP_SECONDS)
        return 0

    def drain(self) -> None:
        threading.Thread(target=self.on_drain, args=(self.cluster.name(0),), name="cluster-drain").start()

    def _stop_all(self, process: str) -> None:
        """Ends all processes where there is nothing to finish."""
        code = self.stop()
        log.info("stopped: %s was told to end", process)
        exit_now(code)

    def _check(self) -> None:
        if self._failure is not None:
            raise ClusterFailed(self._failure)

    def _link(self, process: int, connection: socket.socket) -> Link:
        def on_message(kind: Kind, payload: memoryview, crc: int) -> None:
            self._on_message(process, kind, payload)

        def on_lost(reason: str) -> None:
            if self._expecting.is_set():
                time.sleep(OWN_REASON_SECONDS)
            step = self._progress[process].step
            self.fail(f"{self.cluster.name(process)} {reason} Its last step was {step}.")

        return Link(Wire(connection), self._timeout, on_message, on_lost)

    def _on_message(self, process: int, kind: Kind, payload: memoryview) -> None:
        name = self.cluster.name(process)
        if kind is Kind.DRAIN:
            log.info("%s has been told to end", name)
            threading.Thread(target=self.on_drain, args=(name,), name="cluster-drain").start()
        elif kind in (Kind.FAILED, Kind.REFUSED):
            self.fail(f"{name}: {bytes(payload).decode(errors='replace')}", INVALID if kind is Kind.REFUSED else FAILED)
        elif kind is Kind.ECHO and len(payload) == ECHO.size:
            number, crc, table, seconds = ECHO.unpack(payload)
            # An echo may come late: the next step is sent when this one has ended here.
            sent = self._sent.get(number)
            if sent is None or number != self._progress[process].step + 1 or crc != sent.crc:
                self.fail(f"{name} has executed another step than it was sent: it echoes step {number}, CRC {crc:08x}.")
            elif table != sent.table:
                self.fail(f"{name} has run step {number} with another page table than the host's.")
            else:
                self._finished(process, _Progress(number, seconds))
        else:
            raise CorruptMessage(f"a {kind.name} message of {len(payload)} bytes, which a follower does not send.")

    def _finished(self, process: int, progress: _Progress) -> None:
        with self._lock:
            self._progress[process] = progress
            if all(p.step >= progress.step for p in self._progress):
                del self._sent[progress.step]

    def _watch(self) -> None:
        """Looks for silent and stuck processes."""
        while not self._failed.wait(_POLL):
            for process, link in self._links.items():
                if link.silence > self._timeout and not link.is_closed:
                    self.fail(
                        f"{self.cluster.name(process)} has been silent for {link.silence:.0f} s (--heartbeat-timeout "
                        f"{self._timeout:g}). Its last step was {self._progress[process].step}."
                    )
            with self._lock:
                number, oldest = next(iter(self._sent.items()), (0, None))
                behind = [i for i, p in enumerate(self._progress) if p.step < number]
            if oldest is None or self.watchdog is None:
                continue
            took = time.monotonic() - oldest.began
            if took > self.watchdog * (_FIRST_RUN if oldest.first_run else 1):
                names = ", ".join(map(self.cluster.name, behind))
                self.fail(
                    f"step {number} has been running for {took:.0f} s (--watchdog {self.watchdog:g}"
                    f"{', ten times that for the first run of a program' if oldest.first_run else ''}): {names} not done."
                )


def _exit_on_failure(reason: str, code: int) -> None:
    exit_now(code, after=_TELL_SECONDS)
