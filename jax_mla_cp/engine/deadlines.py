"""Deadlines of requests: `queue_timeout` and `timeout`."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable

from jax_mla_cp.engine.request import FailedKind, Request


class Deadlines:
    """Finds requests whose deadline has passed. Requests are scanned only when the earliest deadline is due."""

    def __init__(self) -> None:
        self._earliest = math.inf

    def add(self, request: Request) -> None:
        self._earliest = min([self._earliest, *(at for at, _, _ in request.deadlines())])

    def expired(self, requests: Iterable[Request]) -> list[tuple[Request, FailedKind, str]]:
        """Finds the expired ones among all requests of the engine: request, kind of failure, message for the client."""
        now = time.monotonic()
        if now < self._earliest:
            return []
        self._earliest, found = math.inf, []
        for request in requests:
            deadlines = list(request.deadlines())
            passed = next(((kind, message) for at, kind, message in deadlines if at <= now), None)
            if passed:
                found.append((request, *passed))
            else:
                self._earliest = min([self._earliest, *(at for at, _, _ in deadlines)])
        return found
