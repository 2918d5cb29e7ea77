"""Which requests' time is over."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable

from jax_mla_cp.engine.request import FailedKind, Request


class Deadlines:
    """The limits of all requests. They are looked at only when it may be the time of one, not in every step."""

    def __init__(self) -> None:
        self._next = math.inf

    def add(self, request: Request) -> None:
        self._next = min([self._next, *(at for at, _, _ in request.deadlines())])

    def over(self, requests: Iterable[Request]) -> list[tuple[Request, FailedKind, str]]:
        """Those of all requests there are whose time is over, what they fail with, and what their owners are told."""
        now = time.monotonic()
        if now < self._next:
            return []
        self._next, found = math.inf, []
        for request in requests:
            limits = list(request.deadlines())
            passed = next(((kind, message) for at, kind, message in limits if at <= now), None)
            if passed:
                found.append((request, *passed))
            else:
                self._next = min([self._next, *(at for at, _, _ in limits)])
        return found
