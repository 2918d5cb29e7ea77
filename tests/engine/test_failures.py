"""Failures and aborts concern their own requests alone; no page is lost, and owners are told."""

from __future__ import annotations

import threading
import time

import pytest

from jax_mla_cp.engine import (
    Engine,
    EngineDead,
    Event,
    Failed,
    Observer,
    QueueFull,
    StepReport,
)
from jax_mla_cp.step.errors import RunnerFailed
from tests.helpers.engine_requests import RecordedRequest, ended, is_alive, is_idle
from tests.helpers.standin import PageModel, continuation
from tests.helpers.waiting import until


def test_abort_frees_the_pages_within_a_step(model: PageModel, engine: Engine) -> None:
    model.gate = threading.Semaphore(0)
    asked = RecordedRequest([1] * 10, 100)
    engine.submit(asked.request)
    model.gate.release(3)
    until(lambda: asked.events.qsize() == 3)
    engine.abort(asked.request)
    model.gate.release(1)
    until(lambda: is_idle(engine))
    assert model.steps <= 4


def test_a_failed_step_fails_its_requests_and_the_others_go_on(model: PageModel, engine: Engine) -> None:
    """The cache is gone after it: what was cached is not reused."""
    model.gate = threading.Semaphore(0)
    decoding, first, beside, waiting = (
        RecordedRequest([1] * 4, 150),
        RecordedRequest([9] * 60, 9),
        RecordedRequest([8] * 20, 9),
        RecordedRequest([9] * 60, 30),
    )
    for asked in (first, beside):
        engine.submit(asked.request)
    model.gate.release(1)  # the first's chunk fills the step, and the two after it
    until(lambda: model.steps == 1)
    model.fail_next = 1
    engine.submit(waiting.request)
    model.gate.release(200)
    assert first.result()[1] == Failed("The step that this request was part of failed.", "step")
    for asked in (beside, waiting):
        assert asked.result()[0] == continuation(asked.request.prompt, asked.request.max_tokens)
    engine.submit(decoding.request)
    assert decoding.result()[0] == continuation([1] * 4, 150)
    assert is_alive(engine) and engine.unhealthy_reason is None


def test_a_refused_work_concerns_its_request_alone(model: PageModel, engine: Engine) -> None:
    """However often: nothing has run, so that the cache and what is named in it stay."""
    model.gate = threading.Semaphore(0)
    running = RecordedRequest([1] * 4, 60)
    engine.submit(running.request)
    model.gate.release(3)
    until(lambda: running.events.qsize() == 3)
    model.refused = 777
    bad = [RecordedRequest([9, 777, 9], 5) for _ in range(5)]
    for asked in bad:
        engine.submit(asked.request)
        model.gate.release(4)
        end = asked.result()[1]
        assert end == Failed("The request's next step is invalid and can't be run.", "internal")
    model.gate.release(200)
    assert running.result()[0] == continuation([1] * 4, 60)
    assert is_alive(engine) and engine.unhealthy_reason is None
    until(lambda: is_idle(engine))


def test_repeated_failures_end_the_engine(model: PageModel, engine: Engine) -> None:
    """Three in a row: a step that succeeds begins the count anew."""

    def fail(times: int) -> None:
        model.fail_next = times
        for _ in range(times):
            asked = RecordedRequest([1], 2)
            engine.submit(asked.request)
            end = asked.result()[1]
            assert isinstance(end, Failed) and end.kind == "step"

    fail(2)
    good = RecordedRequest([1], 2)
    engine.submit(good.request)
    assert good.result()[0] == continuation([1], 2)
    fail(2)
    assert is_alive(engine) and engine.unhealthy_reason is None
    fail(1)
    until(lambda: not is_alive(engine))
    assert engine.unhealthy_reason == "3 steps failed in a row."
    with pytest.raises(EngineDead, match="3 steps failed"):
        engine.submit(RecordedRequest([1], 1).request)


def test_an_engine_without_a_cache_ends(model: PageModel, engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_memory() -> None:
        raise MemoryError

    monkeypatch.setattr(model, "reset", no_memory)
    model.gate, model.fail_next = threading.Semaphore(0), 1
    failed, waiting = RecordedRequest([9] * 40, 9), RecordedRequest([8], 9)  # the first's prompt fills two steps
    engine.submit_all([failed.request, waiting.request])
    model.gate.release(1)
    kinds = [end.kind for a in (failed, waiting) if isinstance(end := a.result()[1], Failed)]
    assert kinds == ["step", "dead"]
    assert (
        not is_alive(engine)
        and engine.unhealthy_reason == "a step failed, and the KV cache could not be allocated again."
    )


def test_a_fault_of_the_loop_itself_ends_the_engine(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who has come meanwhile is told too."""
    first, late = RecordedRequest([1], 1), RecordedRequest([2], 1)

    def faulty() -> None:
        engine.submit(late.request)
        raise AssertionError

    monkeypatch.setattr(engine._scheduler, "schedule", faulty)
    engine.submit(first.request)
    why = "the engine loop failed (AssertionError)."
    assert [a.result()[1] for a in (first, late)] == [Failed(f"The engine has stopped: {why}", "dead")] * 2
    assert not is_alive(engine) and engine.unhealthy_reason == why


def test_stop_fails_what_is_left() -> None:
    """Requests that run, one that waits, and one that has come while a step ran."""
    model = PageModel(max_running=2)
    model.gate = threading.Semaphore(0)
    engine = Engine(model, watchdog_seconds=0)  # any step that runs is told
    engine.start()
    asked = [RecordedRequest([i], 100) for i in range(4)]
    engine.submit_all([a.request for a in asked[:3]])
    model.gate.release(2)
    until(lambda: asked[0].events.qsize() == 2)
    until(lambda: engine.unhealthy_reason is not None)
    engine.submit(asked[3].request)
    stopper = threading.Thread(target=engine.stop)
    stopper.start()
    model.gate.release(10)
    stopper.join(30)
    assert [a.result()[1] for a in asked] == [Failed("The server is stopping.", "stopping")] * 4
    assert not is_alive(engine) and is_idle(engine)


def test_an_owner_that_raises_harms_no_other(engine: Engine) -> None:
    broken, good = RecordedRequest([1], 30), RecordedRequest([2], 30)

    def raises(event: Event) -> None:
        raise RuntimeError("Event loop is closed")

    broken.request.emit = raises
    engine.submit(broken.request)
    engine.submit(good.request)
    assert ended(good) == (continuation([2], 30), "length", None)
    until(lambda: is_idle(engine))


def test_an_observer_that_raises_harms_nobody(model: PageModel) -> None:
    class Broken(Observer):
        def step(self, report: StepReport) -> None:
            raise RuntimeError("no disk")

    engine = Engine(model, observer=Broken())
    engine.start()
    asked = RecordedRequest([1], 5)
    engine.submit(asked.request)
    assert asked.result()[0] == continuation([1], 5)
    engine.stop(5)


def test_the_queue_has_an_end(model: PageModel) -> None:
    engine = Engine(model, max_queued=2)  # beside 4 that run
    engine.submit_all([RecordedRequest([i], 2).request for i in range(4)])
    with pytest.raises(QueueFull, match="4 requests are running or waiting, the limit is 6"):
        engine.submit_all([RecordedRequest([5], 2).request for _ in range(3)])
    last = [RecordedRequest([i], 2) for i in (5, 6)]
    engine.submit_all([a.request for a in last])
    engine.start()
    for a in last:
        assert a.result()[0] == continuation(a.request.prompt, 2)
    with pytest.raises(ValueError, match="need 161 cache slots, the cache has 160"):
        engine.submit(RecordedRequest([1] * 100, 62).request)
    engine.stop(5)


def test_requests_have_limits(model: PageModel) -> None:
    model.gate, model.max_running = threading.Semaphore(0), 1
    engine = Engine(model)
    slow, waits, fine = (
        RecordedRequest([1], 90, timeout=0.2),
        RecordedRequest([2], 1, queue_timeout=0.1),
        RecordedRequest([3], 1, queue_timeout=60),
    )
    engine.submit_all([a.request for a in (slow, waits, fine)])
    engine.start()
    model.gate.release(1)
    until(lambda: slow.events.qsize() == 1)
    time.sleep(0.25)
    model.gate.release(100)
    kinds = [end.kind for a in (waits, slow) if isinstance(end := a.result()[1], Failed)]
    assert kinds == ["queue_timeout", "timeout"]
    assert fine.result()[0] == continuation([3], 1)
    engine.stop(5)
    assert is_idle(engine)


def test_drain_ends_what_is_there_and_takes_nothing_new(model: PageModel, engine: Engine) -> None:
    model.gate = threading.Semaphore(0)
    asked = RecordedRequest([1], 10)
    engine.submit(asked.request)
    assert not engine.drain(0.05), "it runs"
    with pytest.raises(EngineDead, match="stopping"):
        engine.submit(RecordedRequest([1], 1).request)
    model.gate.release(100)
    started = time.monotonic()
    assert engine.drain(30)
    assert time.monotonic() - started < 20, "it waits for the requests, not for the time"
    assert asked.result()[0] == continuation([1], 10)


def test_a_step_that_hangs_is_told() -> None:
    model = PageModel()
    model.gate = threading.Semaphore(0)
    engine = Engine(model, watchdog_seconds=0.05)
    assert engine.unhealthy_reason == "the engine is not running."
    engine.start()
    asked = RecordedRequest([1], 1)
    engine.submit(asked.request)
    until(lambda: engine.unhealthy_reason is not None)
    assert "a step has been running for" in str(engine.unhealthy_reason) and is_alive(engine)
    model.gate.release(1)
    assert asked.result()[0] == continuation([1], 1)
    until(lambda: engine.unhealthy_reason is None)
    engine.stop(5)


def test_a_runner_that_can_run_no_more_ends_the_engine_with_its_reason(
    model: PageModel, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Several processes: one is lost. What ran had been begun, what waits had not."""
    deaths: list[str] = []
    engine.on_death = deaths.append
    running, waiting = RecordedRequest([1] * 40, 9), RecordedRequest([9] * 40, 9)

    def step(groups: object) -> None:
        raise RunnerFailed("process 1 (b) is lost.")

    monkeypatch.setattr(model, "step", step)
    engine.submit_all([running.request, waiting.request])
    assert running.result()[1] == Failed("The engine has stopped: process 1 (b) is lost.", "step")
    assert waiting.result()[1] == Failed("The engine has stopped: process 1 (b) is lost.", "dead")
    assert engine.unhealthy_reason == "process 1 (b) is lost." and deaths == ["process 1 (b) is lost."]
    with pytest.raises(EngineDead, match="process 1"):
        engine.submit(RecordedRequest([1], 1).request)


def test_an_abandoned_engine_fails_its_requests_while_a_step_hangs(model: PageModel, engine: Engine) -> None:
    model.gate = threading.Semaphore(0)
    running = RecordedRequest([1] * 10, 9)
    engine.submit(running.request)
    until(lambda: engine.status().running == 1)
    engine.abandon("process 1 (b) is lost.")
    assert running.result()[1] == Failed("The engine has stopped: process 1 (b) is lost.", "step")
    assert engine.unhealthy_reason == "process 1 (b) is lost."
    model.gate.release(100)  # the step ends after all: nothing more is told
    until(lambda: not is_alive(engine))
    assert running.events.empty()
