"""A server on a thread of the test's own process."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Iterator

import openai
import uvicorn

from jax_mla_cp.serve.app import create_app
from jax_mla_cp.serve.served import Served


@contextlib.contextmanager
def serving(served: Served) -> Iterator[str]:
    """Starts engine and server, gives the address, and stops both."""
    server = uvicorn.Server(uvicorn.Config(create_app(served), log_level="error"))
    listener = socket.create_server(("127.0.0.1", 0))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    served.engine.start()
    thread.start()
    while not server.started:
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(10)
        served.engine.stop(10)


def client_of(url: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
