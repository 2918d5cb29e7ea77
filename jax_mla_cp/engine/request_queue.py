"""Requests in the order of their arrival."""

from __future__ import annotations

import bisect
from collections.abc import Iterator

from jax_mla_cp.engine.request import Request


def _arrival_index(request: Request) -> int:
    return request.arrival_index


class RequestQueue:
    """A first-come-first-served queue, sorted by `Request.arrival_index`: a preempted request returns to its old place.

    Finding a request is a binary search.
    """

    def __init__(self) -> None:
        self._requests: list[Request] = []

    def __len__(self) -> int:
        return len(self._requests)

    def __iter__(self) -> Iterator[Request]:
        """Iterates over a copy: the queue may change meanwhile."""
        return iter(self._requests[:])

    @property
    def last(self) -> Request:
        """The request that arrived last."""
        return self._requests[-1]

    def peek(self, count: int) -> list[Request]:
        """The first `count` requests, which stay in the queue."""
        return self._requests[:count]

    def add(self, request: Request) -> None:
        bisect.insort(self._requests, request, key=_arrival_index)

    def remove(self, request: Request) -> bool:
        """Removes a request. Returns False if it isn't in the queue."""
        at = bisect.bisect_left(self._requests, request.arrival_index, key=_arrival_index)
        found = at < len(self._requests) and self._requests[at] is request
        if found:
            del self._requests[at]
        return found
