"""Graceful shutdown: after the first signal, running requests finish and new ones get 503."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
from types import FrameType
from typing import Any, Protocol

import uvicorn
from starlette.types import ASGIApp, Receive, Scope, Send

from jax_mla_cp.serve.connection import Connection
from jax_mla_cp.serve.errors import unavailable
from jax_mla_cp.serve.limits import MAX_HEADER_BYTES
from jax_mla_cp.serve.security import is_open

log = logging.getLogger(__name__)

_STOP_SECONDS = 5.0
"""Maximum time for the running step to end after its requests have been aborted."""


def uvicorn_config(app: ASGIApp, tls: dict[str, Any]) -> uvicorn.Config:
    """uvicorn's configuration.

    Args:
      tls: from `jax_mla_cp.serve.security.tls_settings`.
    """
    return uvicorn.Config(
        app,
        http=Connection,
        ws="none",
        lifespan="off",
        log_config=None,
        log_level="warning",
        access_log=False,  # RequestLog logs more
        server_header=False,
        timeout_keep_alive=65,  # longer than proxies' own, so that they never send into a connection that is closing
        timeout_graceful_shutdown=5,  # for the last bytes: by then the drain is over
        h11_max_incomplete_event_size=MAX_HEADER_BYTES,
        **tls,
    )


class DrainState:
    """Shared flag: `draining` is true once shutdown has begun. Any thread may read it."""

    def __init__(self) -> None:
        self.draining = False


_WATCHED = frozenset({"/metrics", "/status"})
"""Monitoring, which is answered during the drain too."""


class RejectWhileDraining:
    """ASGI middleware: answers 503 during the drain, so that load balancers use another server."""

    def __init__(self, app: ASGIApp, drain: DrainState):
        self._app = app
        self._drain = drain

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        exempt = scope["type"] != "http" or is_open(scope["path"]) or scope["path"] in _WATCHED
        if self._drain.draining and not exempt:
            error = unavailable("The server is shutting down and accepts no new requests.", "stopping")
            await error.response()(scope, receive, send)
        else:
            await self._app(scope, receive, send)


class DrainableEngine(Protocol):
    """The part of `jax_mla_cp.engine.Engine` that the shutdown needs."""

    def drain(self, timeout: float) -> bool: ...

    def stop(self, timeout: float | None = None) -> None: ...


class Server(uvicorn.Server):
    """uvicorn with a drain: after the first signal the port stays open to answer 503, instead of closing at once."""

    def __init__(self, config: uvicorn.Config, engine: DrainableEngine, drain: DrainState, drain_seconds: float):
        super().__init__(config)
        self._engine = engine
        self._drain = drain
        self._drain_seconds = drain_seconds
        self._signaled = False
        self._loop: asyncio.AbstractEventLoop | None = None
        self._draining: asyncio.Task[None] | None = None
        self.cut_off = False
        """Requests were cut off at the end of the drain."""

    async def serve(self, sockets: list[socket.socket] | None = None) -> None:
        self._loop = asyncio.get_running_loop()
        await super().serve(sockets)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """uvicorn's handler of SIGINT and SIGTERM. Runs on the main thread, between any two instructions."""
        if self._signaled:
            os.write(2, b"\nstopped by a second signal: running requests were cut off.\n")
            os._exit(1)
        self._signaled = True
        self.begin_drain()

    def begin_drain(self) -> None:
        """Starts the drain and returns at once; does nothing if it has begun. Thread-safe."""
        if self._drain.draining:
            return
        self._drain.draining = True
        if self._loop is None:  # not serving yet: nothing to finish
            self.should_exit = True
        else:
            self._loop.call_soon_threadsafe(self._start_draining)

    def _start_draining(self) -> None:
        self._draining = asyncio.ensure_future(self._finish())

    async def _finish(self) -> None:
        log.info(
            "shutting down: new requests get 503, running requests have %g s to finish; a second signal exits at once",
            self._drain_seconds,
        )
        try:
            if not await asyncio.to_thread(self._engine.drain, self._drain_seconds):
                self.cut_off = True
                log.warning("--drain-timeout: cutting off requests that still run after %g s", self._drain_seconds)
                await asyncio.to_thread(self._engine.stop, _STOP_SECONDS)
        finally:
            self.should_exit = True
