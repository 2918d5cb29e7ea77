"""Servers on threads of the test's own process."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Iterator

import openai
import uvicorn
from fastapi import FastAPI

from jax_mla_cp.serve.app import create_app
from jax_mla_cp.serve.served_model import ServedModel
from jax_mla_cp.serve.status import Telemetry
from tests.helpers.waiting import until


@contextlib.contextmanager
def listening(app: FastAPI) -> Iterator[str]:
    """The address of a server for any app."""
    server = uvicorn.Server(uvicorn.Config(app, log_config=None, log_level="critical", timeout_graceful_shutdown=1))
    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        until(lambda: server.started)
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join(10)


@contextlib.contextmanager
def serving(served: ServedModel, telemetry: Telemetry | None = None) -> Iterator[str]:
    """Starts engine and server, gives the address, and stops both."""
    served.engine.start()
    try:
        with listening(create_app(served, telemetry=telemetry)) as url:
            yield url
    finally:
        served.engine.stop(10)


def client_of(url: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
