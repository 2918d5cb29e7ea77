"""From the first signal to the end: what runs is finished, what is new is sent elsewhere."""

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
from jax_mla_cp.serve.security import OPEN_PATHS

log = logging.getLogger(__name__)

_STOP_SECONDS = 5.0
"""For the step that runs to end once its requests are given up."""


def uvicorn_config(app: ASGIApp, tls: dict[str, Any]) -> uvicorn.Config:
    """uvicorn for an application of `jax_mla_cp.serve.app.create_app`.

    Args:
      tls: of `jax_mla_cp.serve.security.tls_settings`.
    """
    return uvicorn.Config(
        app,
        http=Connection,
        ws="none",
        lifespan="off",
        log_config=None,
        log_level="warning",
        access_log=False,  # RequestLog's line says more
        server_header=False,
        timeout_keep_alive=65,  # longer than proxies keep theirs, or they would send into a connection that closes
        timeout_graceful_shutdown=5,  # for the last bytes; what runs has been waited for by then
        h11_max_incomplete_event_size=MAX_HEADER_BYTES,
        **tls,
    )


class Drain:
    """Whether the server is on its way out. Any thread may ask."""

    def __init__(self) -> None:
        self.begun = False


class RefuseNew:
    """ASGI middleware: 503 for what comes during the drain, so that a balancer takes it to another server."""

    def __init__(self, app: ASGIApp, drain: Drain):
        self._app = app
        self._drain = drain

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        watched = scope["type"] != "http" or scope["path"] in OPEN_PATHS or scope["path"] == "/metrics"
        if self._drain.begun and not watched:
            error = unavailable("The server is stopping and takes no new requests.", "stopping")
            await error.response()(scope, receive, send)
        else:
            await self._app(scope, receive, send)


class Drains(Protocol):
    """What the server needs of `jax_mla_cp.engine.Engine` to stop it."""

    def drain(self, timeout: float) -> bool: ...

    def stop(self, timeout: float | None = None) -> None: ...


class Server(uvicorn.Server):
    """uvicorn, which closes its port at the first signal, with a drain before that: the port stays open to say 503."""

    def __init__(self, config: uvicorn.Config, engine: Drains, drain: Drain, drain_seconds: float):
        super().__init__(config)
        self._engine = engine
        self._drain = drain
        self._drain_seconds = drain_seconds
        self._loop: asyncio.AbstractEventLoop | None = None
        self._draining: asyncio.Task[None] | None = None
        self.cut_off = False
        """Requests were given up at the end of the drain."""

    async def serve(self, sockets: list[socket.socket] | None = None) -> None:
        self._loop = asyncio.get_running_loop()
        await super().serve(sockets)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """uvicorn's handler of SIGINT and SIGTERM, on the main thread, between any two of its instructions."""
        if self._drain.begun:
            os.write(2, b"\nstopped at once: what ran is cut off.\n")
            os._exit(1)
        self.begin_drain()

    def begin_drain(self) -> None:
        """Any thread may call it; returns at once."""
        self._drain.begun = True
        if self._loop is None:  # a signal before there is anything to finish
            self.should_exit = True
        else:
            self._loop.call_soon_threadsafe(self._start_draining)

    def _start_draining(self) -> None:
        self._draining = asyncio.ensure_future(self._finish())

    async def _finish(self) -> None:
        log.info(
            "stopping: new requests get 503, running ones have %g s to finish; a second signal leaves at once",
            self._drain_seconds,
        )
        try:
            if not await asyncio.to_thread(self._engine.drain, self._drain_seconds):
                self.cut_off = True
                log.warning("--drain-timeout: requests still run after %g s and are cut off", self._drain_seconds)
                await asyncio.to_thread(self._engine.stop, _STOP_SECONDS)
        finally:
            self.should_exit = True
