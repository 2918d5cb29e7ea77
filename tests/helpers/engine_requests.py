"""Requests whose events a test can wait for, and the state of an engine."""

from __future__ import annotations

import queue
from collections.abc import Sequence
from typing import Any

from jax_mla_cp.batch.step_request import SamplingParams
from jax_mla_cp.engine import Engine, Event, Failed, Finished, Request, Token
from jax_mla_cp.engine.text import TextStream


class RecordedRequest:
    """A request that records its events."""

    def __init__(
        self,
        prompt: Sequence[int],
        max_tokens: int,
        stop: frozenset[int] = frozenset(),
        text: TextStream | None = None,
        **options: Any,
    ):
        self.events: queue.Queue[Event] = queue.Queue()
        self.request = Request(
            list(prompt),
            max_tokens,
            SamplingParams(temperature=0),
            stop,
            text or TextStream(None),
            self.events.put,
            **options,
        )
        self.all: list[Event] = []

    def result(self, timeout: float = 30) -> tuple[list[int], Finished | Failed]:
        """The tokens and the end; all events are in `all`."""
        while True:
            event = self.events.get(timeout=timeout)
            self.all.append(event)
            if isinstance(event, Finished | Failed):
                return [e.token for e in self.all if isinstance(e, Token)], event


def is_idle(engine: Engine) -> bool:
    """No request is waiting or running, and no page is in use."""
    now = engine.status()
    return not (now.waiting or now.running or now.pages_used)


def is_alive(engine: Engine) -> bool:
    """The thread runs, and the engine hasn't given up, whatever the watchdog says."""
    return engine._thread.is_alive() and engine._dead is None


def ended(asked: RecordedRequest) -> tuple[list[int], str, int | str | None]:
    tokens, end = asked.result()
    assert isinstance(end, Finished), end
    return tokens, end.reason, end.stop
