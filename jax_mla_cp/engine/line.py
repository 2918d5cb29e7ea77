"""Requests in the order of their arrival."""

from __future__ import annotations

import bisect
from collections.abc import Iterator

from jax_mla_cp.engine.request import Request


def _arrival(request: Request) -> int:
    return request.arrival


class Line:
    """Sorted by `Request.arrival`, so that one that comes back gets its old place. Finding one takes no search of all."""

    def __init__(self) -> None:
        self._requests: list[Request] = []

    def __len__(self) -> int:
        return len(self._requests)

    def __iter__(self) -> Iterator[Request]:
        """Those that are in it now, whatever happens to it meanwhile."""
        return iter(self._requests[:])

    @property
    def last(self) -> Request:
        """The one that arrived last."""
        return self._requests[-1]

    def first(self, count: int) -> list[Request]:
        return self._requests[:count]

    def add(self, request: Request) -> None:
        bisect.insort(self._requests, request, key=_arrival)

    def remove(self, request: Request) -> bool:
        """Whether it was there."""
        at = bisect.bisect_left(self._requests, request.arrival, key=_arrival)
        there = at < len(self._requests) and self._requests[at] is request
        if there:
            del self._requests[at]
        return there
