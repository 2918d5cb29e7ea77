"""The server with its middleware over an engine without a model: it says "a" until told to stop."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jax_mla_cp.engine import EngineStatus, Failed, Finished, Request, Token
from jax_mla_cp.mesh import MeshShape
from jax_mla_cp.serve.app import create_app
from jax_mla_cp.serve.lifecycle import Server, uvicorn_config
from jax_mla_cp.serve.middleware import MiddlewareStack
from jax_mla_cp.serve.served_model import ServedModel
from jax_mla_cp.serve.status import ServerInfo, Telemetry
from tests.helpers.byte_tokenizer import byte_tokenizer
from tests.helpers.waiting import until

SEED = 77
"""The server's, for requests without one."""
BODY = {"model": "tiny", "prompt": "Hello", "max_tokens": 3}


class Echo:
    """An engine of one letter. `gate`, if set, is asked for a permit before each token."""

    def __init__(self) -> None:
        self.unhealthy_reason: str | None = None
        self.refuse: Exception | None = None
        self.gate: threading.Semaphore | None = None
        self.requests: list[Request] = []
        self.ends: list[Finished | Failed] = []
        """Ends of the next requests, one after the other; a request without one ends by its length."""
        self._stopped = threading.Event()
        self._threads: list[threading.Thread] = []

    def status(self) -> EngineStatus:
        return EngineStatus(0, 0, 1, 1, 0, 0, 0, 0, 0, None, None)

    def submit_all(self, requests: Sequence[Request]) -> None:
        if self.refuse is not None:
            raise self.refuse
        for request in requests:
            request.submit_time = request.start_time = time.monotonic()
            self.requests.append(request)
            self._threads.append(threading.Thread(target=self._run, args=(request,), daemon=True))
            self._threads[-1].start()

    def abort(self, request: Request) -> None:
        pass

    def drain(self, timeout: float) -> bool:
        deadline = time.monotonic() + timeout
        for thread in self._threads:
            thread.join(max(deadline - time.monotonic(), 0))
        return not any(thread.is_alive() for thread in self._threads)

    def stop(self, timeout: float | None = None) -> None:
        self._stopped.set()

    def _run(self, request: Request) -> None:
        for _ in range(request.max_tokens):
            while self.gate is not None and not self.gate.acquire(timeout=0.05):
                if self._stopped.is_set():
                    request.emit(Failed("The server is stopping.", "stopping"))
                    return
            request.emit(Token(97, "a", -0.5, np.zeros(0, np.int32), np.zeros(0, np.float32)))
        request.emit(self.ends.pop(0) if self.ends else Finished("length", ""))


class Running:
    """One with its port open."""

    def __init__(
        self, middleware: MiddlewareStack | None, tls: dict[str, Any], drain_seconds: float, send_buffer: int | None
    ):
        self.engine = Echo()
        middleware = middleware or MiddlewareStack()
        served = ServedModel("tiny", self.engine, byte_tokenizer(), 259, 600, (3,), SEED)  # type: ignore[arg-type]
        telemetry = Telemetry(ServerInfo("tiny", 600, False, MeshShape(), {}))
        self.app = create_app(served, middleware, telemetry)
        self.server = Server(uvicorn_config(self.app, tls), self.engine, middleware.drain, drain_seconds)
        self._listener = socket.create_server(("127.0.0.1", 0))
        if send_buffer is not None:
            self._listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, send_buffer)  # its connections have it too
        self.address = self._listener.getsockname()
        self.url = f"{'https' if tls else 'http'}://127.0.0.1:{self.address[1]}"
        self.thread = threading.Thread(target=self.server.run, kwargs={"sockets": [self._listener]}, daemon=True)

    def raw(self, data: bytes, *, timeout: float = 10) -> bytes:
        """All that comes back for these bytes, up to the connection's end."""
        with socket.create_connection(self.address, timeout=timeout) as connection:
            connection.sendall(data)
            found = b""
            with contextlib.suppress(ConnectionResetError):
                while part := connection.recv(65536):
                    found += part
        return found


@contextlib.contextmanager
def running(
    middleware: MiddlewareStack | None = None,
    *,
    tls: dict[str, Any] | None = None,
    drain_seconds: float = 10,
    send_buffer: int | None = None,
) -> Iterator[Running]:
    """A server on a thread.

    Args:
      send_buffer: bytes that the system takes of an answer that nobody reads; None: its own choice, megabytes.
    """
    one = Running(middleware, tls or {}, drain_seconds, send_buffer)
    one.thread.start()
    until(lambda: one.server.started)
    try:
        yield one
    finally:
        one.engine.stop()
        one.server.should_exit = True
        one.thread.join(20)
        assert not one.thread.is_alive()


def write(path: Path, text: str) -> Path:
    """A file that only its owner may read."""
    path.write_text(text)
    path.chmod(0o600)
    return path
