"""The engine: every request gets its own right answer, whatever arrives, ends or fails around it; no page is lost."""

from __future__ import annotations

import threading

import pytest

from jax_mla_cp.engine import (
    Engine,
    Finished,
    Observer,
    RequestReport,
    StepReport,
)
from jax_mla_cp.engine.page_pool import PagePool
from tests.helpers.engine_requests import RecordedRequest, is_idle
from tests.helpers.standin import PageModel, continuation
from tests.helpers.waiting import until


def test_many_threads(engine: Engine) -> None:
    asked = [RecordedRequest([i, 2, 3] * (1 + i % 9), 5 + i % 7) for i in range(40)]
    threads = [threading.Thread(target=engine.submit, args=(a.request,)) for a in asked]
    for thread in threads:
        thread.start()
    for a in asked:
        tokens, end = a.result()
        assert tokens == continuation(a.request.prompt, a.request.max_tokens)
        assert isinstance(end, Finished) and end.reason == "length"
    until(lambda: is_idle(engine))


def test_drafts_save_steps_and_fit_the_pages() -> None:
    """The guesses about the last tokens would need pages that the request has not got."""
    plain, speculating = PageModel(pages=16, page_size=4), PageModel(pages=16, page_size=4, draft_tokens=4)
    for model in (plain, speculating):
        engine = Engine(model)
        engine.start()
        asked = RecordedRequest([1] * 10, 55)  # 64 places
        engine.submit(asked.request)
        assert asked.result()[0] == continuation([1] * 10, 55)
        engine.stop(5)
    assert speculating.steps < 0.6 * plain.steps


def test_a_new_request_joins_while_another_decodes(model: PageModel, engine: Engine) -> None:
    model.gate = threading.Semaphore(0)
    first, second = (
        RecordedRequest([1, 2], 50),
        RecordedRequest([5] * 40, 3),
    )  # the second's prompt takes three steps of 16
    engine.submit(first.request)
    model.gate.release(5)
    until(lambda: first.events.qsize() == 5)
    engine.submit(second.request)
    model.gate.release(6)
    until(lambda: first.events.qsize() == 11)  # decoding went on, token by token, beside the chunks
    until(lambda: second.events.qsize() == 2)  # two steps were under way already, three were its chunks
    model.gate.release(100)
    assert second.result()[0] == continuation([5] * 40, 3)
    assert first.result()[0] == continuation([1, 2], 50)


def test_the_pool_refuses_pages_it_has_not() -> None:
    pool = PagePool(4, 16)
    pages = pool.allocate(pool.pages_for(33))
    assert len(pages) == 3 and pool.num_free == 1
    with pytest.raises(ValueError, match="2 pages requested, 1 of 4"):
        pool.allocate(2)
    pool.release(pages)
    assert pool.num_free == 4
    with pytest.raises(ValueError, match="not in use"):
        pool.release(pages[:1])


def test_the_last_sampled_token_needs_no_place() -> None:
    """60 + 5 tokens on exactly 64 slots: the last token is answered, not cached."""
    engine = Engine(PageModel(pages=16, page_size=4))
    engine.start()
    asked = RecordedRequest([1] * 60, 5)
    engine.submit(asked.request)
    assert asked.result()[0] == continuation([1] * 60, 5)
    engine.stop(5)


class Seen(Observer):
    """An observer that keeps what it is told."""

    def __init__(self) -> None:
        self.steps: list[StepReport] = []
        self.requests: list[RequestReport] = []
        self.times: dict[str, list[float]] = {"started": [], "first_token": [], "token": []}
        self.preemptions = 0

    def step(self, report: StepReport) -> None:
        self.steps.append(report)

    def started(self, queue_seconds: float) -> None:
        self.times["started"].append(queue_seconds)

    def first_token(self, seconds_since_arrival: float) -> None:
        self.times["first_token"].append(seconds_since_arrival)

    def token(self, seconds_since_last: float) -> None:
        self.times["token"].append(seconds_since_last)

    def finished(self, report: RequestReport) -> None:
        self.requests.append(report)

    def preempted(self) -> None:
        self.preemptions += 1


def test_what_an_observer_is_told() -> None:
    model, seen = PageModel(pages=15, cp=2), Seen()
    engine = Engine(model, observer=seen)
    asked = [RecordedRequest([i] * 19, 9, id=f"r{i}") for i in range(3)] + [RecordedRequest([0] * 19, 1)]
    engine.submit_all([a.request for a in asked])
    engine.start()
    for a in asked:
        a.result()
    until(lambda: len(seen.steps) == model.steps)
    engine.stop(5)
    assert [(p.id, p.cached, p.new, p.total) for p in seen.steps[0].prefills] == [("r0", 0, 16, 19)]
    assert seen.steps[0].rank_tokens == (8, 8) and sum(seen.steps[0].rank_pairs) == 16 * 17 / 2
    assert abs(seen.steps[0].rank_pairs[0] - seen.steps[0].rank_pairs[1]) <= 32
    assert len(seen.steps) > 1
    assert all(sum(s.rank_tokens) == s.prefill_tokens + s.decode_tokens for s in seen.steps)
    assert all(0 < s.host_seconds <= s.seconds for s in seen.steps)
    assert [len(seen.times[kind]) for kind in ("started", "first_token", "token")] == [4, 4, 24]
    assert sorted(r.output_tokens for r in seen.requests) == [1, 9, 9, 9]
    assert all(
        r.reason == "length" and r.e2e_seconds >= r.queue_seconds + r.prefill_seconds >= 0 for r in seen.requests
    )
    assert sum(r.cached_tokens for r in seen.requests) == engine.status().prefix_hits > 0
    assert seen.preemptions == engine.status().preemptions > 0
    assert engine.status().prefix_queries == 4 * 19, "who comes back is not counted again"


def test_a_shared_prefix_is_computed_once() -> None:
    """3000 tokens, asked 20 times at once: those that come later wait for the first one's pages."""
    prefix = [(n * n) % 250 for n in range(3000)]
    model, seen = PageModel(pages=1200, page_size=16, max_running=8, prefill_chunk=1024), Seen()
    engine = Engine(model, observer=seen)
    asked = [RecordedRequest([*prefix, i, i], 2) for i in range(20)]
    engine.submit_all([a.request for a in asked])
    engine.start()
    for i, a in enumerate(asked):
        tokens, end = a.result(60)
        assert tokens == continuation([*prefix, i, i], 2)
        assert isinstance(end, Finished) and end.cached_tokens == (0 if i == 0 else 2992)
    computed = sum(step.prefill_tokens for step in seen.steps)
    engine.stop(5)
    assert computed < 20 * 3002 / 10
    status = engine.status()
    assert (status.prefix_queries, status.prefix_hits) == (20 * 3002, 19 * 2992)
    assert is_idle(engine) and status.pages_cached > 180
