"""Programs of this project as their users start them."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import IO


def environment(**variables: str) -> dict[str, str]:
    """This process's and these, without what sets up its own devices."""
    return {k: v for k, v in os.environ.items() if k not in ("JAX_NUM_CPU_DEVICES", "XLA_FLAGS")} | variables


@contextlib.contextmanager
def started(
    module: str, *flags: str, errors: int | IO[str] = subprocess.PIPE, **variables: str
) -> Iterator[subprocess.Popen[str]]:
    """`python -m` a module, killed if it still runs at the end."""
    process = subprocess.Popen(
        [sys.executable, "-m", module, *flags],
        env=environment(**variables),
        text=True,
        stdout=subprocess.PIPE,
        stderr=errors,
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def server(
    *flags: str, errors: int | IO[str] = subprocess.PIPE, **variables: str
) -> contextlib.AbstractContextManager[subprocess.Popen[str]]:
    """The server, on any free port unless the flags say which."""
    return started("jax_mla_cp.serve", "--port", "0", *flags, errors=errors, **variables)


def url_of(process: subprocess.Popen[str], log: Path | None = None) -> str:
    """The address of a server, without /v1, once it is ready.

    Args:
      log: where its standard error goes; None: to a pipe.
    """
    assert process.stdout is not None
    told = ""
    for line in process.stdout:  # Gloo may write its own lines first
        if match := re.search(r"ready in \d+ s: (http://\S+)/v1", line):
            return match[1]
        told += line
    process.kill()
    errors = process.communicate()[1] if log is None else log.read_text()
    raise AssertionError(f"it is not ready: {told}{errors}")


@dataclasses.dataclass
class Cluster:
    """Server processes that share a mesh. Process 0 leads."""

    processes: list[subprocess.Popen[str]]
    logs: list[Path]
    """Standard error of each."""
    coordinator: str

    def wait_until_ready(self) -> str:
        """The server's address, without /v1."""
        return url_of(self.processes[0], self.logs[0])

    def log(self, process: int) -> str:
        """A process's standard error, in one line."""
        return " ".join(self.logs[process].read_text(errors="replace").split())

    def send(self, process: int, number: int) -> None:
        self.processes[process].send_signal(number)

    def stop(self, seconds: float = 60) -> None:
        """Ends all; each must end cleanly."""
        self.send(0, signal.SIGTERM)
        assert self.wait(seconds) == [0] * len(self.processes), [path.read_text()[-3000:] for path in self.logs]

    def wait(self, seconds: float = 60) -> list[int]:
        """The processes' exit codes."""
        return [process.wait(seconds) for process in self.processes]


@contextlib.contextmanager
def cluster(
    logs: Path, count: int, *flags: str, own: dict[int, tuple[str, ...]] | None = None, coordinator: str | None = None
) -> Iterator[Cluster]:
    """A server as several processes, killed if they still run at the end.

    Args:
      logs: a directory for what they write to standard error.
      own: flags of one process alone.
      coordinator: its address. None: a free port of this machine.
    """
    if coordinator is None:
        with socket.create_server(("127.0.0.1", 0)) as probe:
            coordinator = f"127.0.0.1:{probe.getsockname()[1]}"
    shared = ("--coordinator", coordinator, "--num-processes", str(count), *flags)
    with contextlib.ExitStack() as stack:
        paths = [logs / f"process-{i}.log" for i in range(count)]
        processes = [
            stack.enter_context(
                server(
                    *shared, "--process-id", str(i), *(own or {}).get(i, ()), errors=stack.enter_context(path.open("w"))
                )
            )
            for i, path in enumerate(paths)
        ]
        yield Cluster(processes, paths, coordinator)
