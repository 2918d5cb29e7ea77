"""`Workers`: threads of their own for work that takes long."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from jax_mla_cp.serve.errors import unavailable

T = TypeVar("T")


class Workers:
    """A few threads with a bounded queue. What they do can't hold up the work that `asyncio.to_thread` does for other requests.

    Used from one event loop.

    Args:
      work: the work, for the error message.
    """

    def __init__(self, work: str, *, threads: int, max_queued: int):
        self._work = work
        self._threads = threads
        self._max_queued = max_queued
        self._unfinished = 0
        self._executor = ThreadPoolExecutor(threads, thread_name_prefix="worker")

    async def run(self, function: Callable[[], T]) -> T:
        """Returns the function's result. If this is cancelled before a thread is free, the function does not run.

        Raises:
          ApiError: 503: the queue is full.
        """
        if (waiting := self._unfinished - self._threads) >= self._max_queued:
            raise unavailable(f"The server is busy: {waiting} requests wait for {self._work}.", "queue_full")
        self._unfinished += 1
        future = self._executor.submit(function)
        loop = asyncio.get_running_loop()
        future.add_done_callback(lambda _: loop.call_soon_threadsafe(self._finish))
        return await asyncio.wrap_future(future)

    def _finish(self) -> None:
        self._unfinished -= 1
