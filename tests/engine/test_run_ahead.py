"""One step ahead: what is dispatched, what is dropped, and what is read last."""

from __future__ import annotations

import threading

import pytest

from jax_mla_cp.batch.step_request import last_sampled
from jax_mla_cp.engine import Engine, Failed, Finished, Observer, RequestReport, Token
from jax_mla_cp.engine.output_processor import process_output
from jax_mla_cp.engine.scheduled_request import PreparedRequest
from jax_mla_cp.engine.scheduler import Scheduler
from jax_mla_cp.engine.text import TextStream
from jax_mla_cp.step.results import StepResult
from tests.helpers.byte_tokenizer import byte_tokenizer
from tests.helpers.engine_requests import RecordedRequest, is_idle
from tests.helpers.standin import PageModel, continuation
from tests.helpers.waiting import until


@pytest.mark.parametrize(("overlap", "extra"), [(True, 1), (False, 0)])
def test_max_tokens_is_known_in_advance_and_a_stop_token_is_not(overlap: bool, extra: int) -> None:
    want = continuation([1, 2], 8)
    stop = next(token for n, token in enumerate(want) if n >= 3 and token not in want[:n])
    for asked, steps in (
        (RecordedRequest([1, 2], 8), 8),
        (RecordedRequest([1, 2], 9, frozenset({stop})), want.index(stop) + 1 + extra),
    ):
        model = PageModel()
        engine = Engine(model, overlap=overlap)
        engine.submit(asked.request)
        engine.start()
        assert asked.result()[0] == want[: steps if asked.request.max_tokens == 8 else want.index(stop) + 1]
        until(lambda model=model, steps=steps: model.steps == steps)  # type: ignore[misc]
        engine.stop(5)
        assert model.steps == steps and is_idle(engine)


def test_a_token_in_flight_is_named_by_its_slot() -> None:
    scheduler = Scheduler(groups=1, pages_per_group=40, page_size=4, max_running=4, prefill_chunk=16)
    request = RecordedRequest([1, 2], 8).request
    scheduler.add(request)
    advanced(scheduler)
    assert (request.num_pending_tokens, request.num_known_tokens, request.num_computed_tokens) == (1, 2, 2)
    ((second,),) = scheduler.schedule()
    assert second.prepare().step_request.tokens == [last_sampled(request.slot)]


def advanced(scheduler: Scheduler) -> PreparedRequest:
    """The only request's part of a step that is in flight."""
    ((scheduled,),) = scheduler.schedule()
    part = scheduled.prepare()
    part.advance()
    return part


def test_a_step_from_before_a_preemption_verifies_nothing() -> None:
    """It computed pages that the request has no longer."""
    scheduler = Scheduler(groups=1, pages_per_group=40, page_size=4, max_running=4, prefill_chunk=16)
    request = RecordedRequest([1] * 40, 8).request
    scheduler.add(request)
    before = advanced(scheduler)
    scheduler.groups[0].remove(request)  # preempted and started again in one schedule, in another dp group
    scheduler.waiting.add(request)
    after = advanced(scheduler)
    process_output(before, StepResult([], []))
    assert request.num_verified_tokens == 0
    process_output(after, StepResult([], []))
    assert request.num_verified_tokens == 16


def test_who_has_ended_is_not_told_of_a_failure_after_it() -> None:
    """The step in flight that fails has a row for it still."""
    model = PageModel()
    model.gate = threading.Semaphore(0)
    stop = continuation([1, 2], 3)[2]
    ending, beside = RecordedRequest([1, 2], 9, frozenset({stop})), RecordedRequest([5], 9)
    engine = Engine(model)
    engine.submit_all([ending.request, beside.request])
    engine.start()
    model.gate.release(3)
    tokens, end = ending.result()
    assert tokens[-1] == stop and isinstance(end, Finished)
    model.fail_next = 1
    model.gate.release(1)
    assert isinstance(beside.result()[1], Failed)
    engine.stop(5)
    assert ending.events.empty() and model.resets == 1


def test_pending_tokens_count_neither_for_min_tokens_nor_as_output() -> None:
    """The second token would be a stop string, and a stop token ends the request while another token is in flight."""
    prompt = next([n] for n in range(251) if all(32 <= t < 127 for t in continuation([n], 3)))
    want = continuation(prompt, 4)
    text = TextStream(byte_tokenizer(), [chr(want[1])])
    early = RecordedRequest(prompt, 4, text=text, min_tokens=2)
    stopped = RecordedRequest(prompt, 9, frozenset({want[2]}))
    reports: list[RequestReport] = []
    observer = Observer()
    observer.finished = reports.append  # type: ignore[method-assign]
    engine = Engine(PageModel(), observer=observer)
    engine.submit_all([early.request, stopped.request])
    engine.start()
    tokens = early.result()[0]
    assert len(tokens) > 2 and stopped.result()[0] == want[:3]
    engine.stop(5)
    assert sorted(report.output_tokens for report in reports) == sorted([len(tokens), 3])


def test_the_step_in_flight_is_read_before_the_engine_stops() -> None:
    model = PageModel()
    model.runs_late = False
    model.gate = threading.Semaphore(0)
    asked = RecordedRequest([1, 2], 50)
    engine = Engine(model)
    engine.submit(asked.request)
    engine.start()
    model.gate.release(3)
    until(lambda: model.steps == 3)
    stopping = threading.Thread(target=engine.stop, args=(30,))
    stopping.start()
    model.gate.release(10)
    stopping.join(30)
    tokens, end = asked.result()
    assert isinstance(end, Failed) and end.kind == "stopping"
    assert len(tokens) == model.steps == len([e for e in asked.all if isinstance(e, Token)])
