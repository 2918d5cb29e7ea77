"""Deadlines, by a clock that the test moves."""

from __future__ import annotations

import types

import pytest

from jax_mla_cp.engine.deadlines import Deadlines
from jax_mla_cp.engine.request import Request
from tests.helpers.engine_requests import RecordedRequest


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> types.SimpleNamespace:
    clock = types.SimpleNamespace(now=0.0)
    clock.monotonic = lambda: clock.now
    monkeypatch.setattr("jax_mla_cp.engine.deadlines.time", clock)
    return clock


def arrived(at: float, **limits: float) -> Request:
    request = RecordedRequest([1], 1, **limits).request
    request.arrival_time = request.submit_time = at
    return request


def test_each_limit_counts_from_the_arrival(clock: types.SimpleNamespace) -> None:
    deadlines = Deadlines()
    free, queued, slow = arrived(0), arrived(5, queue_timeout=2), arrived(5, queue_timeout=20, timeout=9)
    requests = [free, queued, slow]
    for request in requests:
        deadlines.add(request)
    clock.now = 6.9
    assert deadlines.expired(requests) == []
    clock.now = 7
    [(request, kind, message)] = deadlines.expired(requests)
    assert request is queued and kind == "queue_timeout" and "did not start within 2 s" in message
    clock.now = 13.9
    assert deadlines.expired([free, slow]) == []
    clock.now = 14
    [(request, kind, message)] = deadlines.expired([free, slow])
    assert request is slow and kind == "timeout" and "did not finish within 9 s" in message


def test_who_has_started_may_not_be_late_in_the_queue(clock: types.SimpleNamespace) -> None:
    deadlines, request = Deadlines(), arrived(0, queue_timeout=2, timeout=50)
    deadlines.add(request)
    request.start_time, clock.now = 1.9, 49
    assert deadlines.expired([request]) == []
    clock.now = 50
    assert [kind for _, kind, _ in deadlines.expired([request])] == ["timeout"]


def test_nobody_is_looked_at_before_it_may_be_time(clock: types.SimpleNamespace) -> None:
    deadlines, request = Deadlines(), arrived(0, timeout=10)
    deadlines.add(request)
    clock.now = 9
    looked_at = iter([request])
    assert deadlines.expired(looked_at) == [] and next(looked_at) is request
