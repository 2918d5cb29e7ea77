"""The engine: every request gets its own right answer, whatever arrives, ends or fails around it; no page is lost."""

from __future__ import annotations

import threading
import time

import numpy as np
import pytest

from jax_mla_cp.engine import (
    Engine,
    EngineDead,
    Event,
    Failed,
    Finished,
    PromptScored,
    QueueFull,
    RequestReport,
    StepReport,
)
from jax_mla_cp.engine.pages import Pages
from jax_mla_cp.engine.text import TextStream
from tests.byte_tokenizer import byte_tokenizer
from tests.engine.asked import Asked, until
from tests.engine.standin import VOCAB, PageModel, continuation, logprob


@pytest.fixture
def model() -> PageModel:
    return PageModel()


@pytest.fixture
def engine(model: PageModel) -> Engine:
    engine = Engine(model)
    engine.start()
    yield engine
    if model.gate:
        model.gate.release(10_000)
    engine.stop(timeout=10)


def ended(asked: Asked) -> tuple[list[int], str, int | str | None]:
    tokens, end = asked.result()
    assert isinstance(end, Finished), end
    return tokens, end.reason, end.stop


def test_many_threads(engine: Engine) -> None:
    asked = [Asked([i, 2, 3] * (1 + i % 9), 5 + i % 7) for i in range(40)]
    threads = [threading.Thread(target=engine.submit, args=(a.request,)) for a in asked]
    for thread in threads:
        thread.start()
    for a in asked:
        tokens, end = a.result()
        assert tokens == continuation(a.request.prompt, a.request.max_tokens)
        assert isinstance(end, Finished) and end.reason == "length"
    until(lambda: engine.idle)


def test_what_follows_an_end_within_a_run_is_dropped() -> None:
    """Stop tokens, stop strings and max_tokens end a request wherever they fall among the drafts that hold."""
    model = PageModel(draft_tokens=4)
    engine = Engine(model)
    engine.start()
    for i in range(12):
        prompt = [i, 2, 3] * (1 + i % 9)
        want = continuation(prompt, 20)
        bytes_only = [t for t in want[3:] if 32 <= t < 127]
        stop = chr(bytes_only[-1])
        asked = [
            *(Asked(prompt, most) for most in range(1, 9)),
            *(Asked(prompt, 20, frozenset({token})) for token in want[:8]),
            Asked(prompt, 20, text=TextStream(byte_tokenizer(), [stop])),
        ]
        for a in asked:
            engine.submit(a.request)
        for most, a in enumerate(asked[:8], 1):
            assert ended(a) == (want[:most], "length", None)
        for token, a in zip(want, asked[8:16], strict=False):
            assert ended(a) == (want[: want.index(token) + 1], "stop", token)
        assert ended(asked[-1]) == (want[: want.index(ord(stop)) + 1], "stop", stop)
    until(lambda: engine.idle)
    assert engine.speculation is not None
    assert engine.speculation.drafted == sum(drafts * times for (drafts, _), times in model.held.items())
    assert engine.speculation.accepted == sum(held * times for (_, held), times in model.held.items())
    assert {(4, held) for held in range(5)} < set(model.held), "every number of drafts held"
    engine.stop(5)


def test_drafts_save_steps_and_fit_the_pages() -> None:
    """The guesses about the last tokens would need pages that the request has not got."""
    plain, speculating = PageModel(pages=16, page_size=4), PageModel(pages=16, page_size=4, draft_tokens=4)
    for model in (plain, speculating):
        engine = Engine(model)
        engine.start()
        asked = Asked([1] * 10, 55)  # 64 places
        engine.submit(asked.request)
        assert asked.result()[0] == continuation([1] * 10, 55)
        engine.stop(5)
    assert speculating.steps < 0.6 * plain.steps


def test_a_new_request_joins_while_another_decodes(model: PageModel, engine: Engine) -> None:
    model.gate = threading.Semaphore(0)
    first, second = Asked([1, 2], 50), Asked([5] * 40, 3)  # the second's prompt takes three steps of 16
    engine.submit(first.request)
    model.gate.release(5)
    until(lambda: first.events.qsize() == 5)
    engine.submit(second.request)
    model.gate.release(5)
    until(lambda: first.events.qsize() == 10)  # decoding went on, token by token, beside the chunks
    until(lambda: second.events.qsize() == 2)  # one step was under way already, three were its chunks
    model.gate.release(100)
    assert second.result()[0] == continuation([5] * 40, 3)
    assert first.result()[0] == continuation([1, 2], 50)


def test_abort_frees_the_pages_within_a_step(model: PageModel, engine: Engine) -> None:
    model.gate = threading.Semaphore(0)
    asked = Asked([1] * 10, 100)
    engine.submit(asked.request)
    model.gate.release(3)
    until(lambda: asked.events.qsize() == 3)
    engine.abort(asked.request)
    model.gate.release(1)
    until(lambda: engine.idle)
    assert model.steps <= 4


def test_a_failed_step_fails_its_requests_and_the_others_go_on(model: PageModel, engine: Engine) -> None:
    """The cache is gone after it: what was cached is not reused."""
    model.gate = threading.Semaphore(0)
    decoding, first, beside, waiting = Asked([1] * 4, 150), Asked([9] * 40, 9), Asked([8] * 20, 9), Asked([9] * 40, 30)
    for asked in (first, beside):
        engine.submit(asked.request)
    model.gate.release(1)  # the first's chunk fills the step
    until(lambda: model.steps == 1)
    model.fail_next = 1
    engine.submit(waiting.request)
    model.gate.release(200)
    assert first.result()[1] == Failed("The step that this request was part of failed.", "step")
    for asked in (beside, waiting):
        assert asked.result()[0] == continuation(asked.request.prompt, asked.request.max_tokens)
    engine.submit(decoding.request)
    assert decoding.result()[0] == continuation([1] * 4, 150)
    assert engine.alive and engine.unhealthy_reason is None


def test_repeated_failures_end_the_engine(model: PageModel, engine: Engine) -> None:
    model.fail_next = 3
    for _ in range(3):
        asked = Asked([1], 2)
        engine.submit(asked.request)
        end = asked.result()[1]
        assert isinstance(end, Failed) and end.kind == "step"
    until(lambda: not engine.alive)
    assert engine.unhealthy_reason == "3 steps failed in a row."
    with pytest.raises(EngineDead, match="3 steps failed"):
        engine.submit(Asked([1], 1).request)


def test_stop_fails_what_is_left() -> None:
    model = PageModel()
    model.gate = threading.Semaphore(0)
    engine = Engine(model)
    engine.start()
    asked = [Asked([1], 100), Asked([2], 150)]
    for a in asked:
        engine.submit(a.request)
    model.gate.release(2)
    until(lambda: asked[0].events.qsize() == 2)
    stopper = threading.Thread(target=engine.stop)
    stopper.start()
    model.gate.release(10)
    stopper.join(5)
    assert all(isinstance(a.result()[1], Failed) for a in asked)
    assert not engine.alive and engine.idle


def test_pages_refuse_what_is_not_theirs() -> None:
    pages = Pages(4, 16)
    taken = pages.allocate(pages.needed(33))
    assert len(taken) == 3 and pages.free == 1
    with pytest.raises(ValueError, match="2 pages asked for, 1 of 4"):
        pages.allocate(2)
    pages.release(taken)
    assert pages.free == 4
    with pytest.raises(ValueError, match="not in use"):
        pages.release(taken[:1])


def test_the_last_sampled_token_needs_no_place() -> None:
    """60 + 5 tokens on exactly 64 slots: the last token is answered, not cached."""
    engine = Engine(PageModel(pages=16, page_size=4))
    engine.start()
    asked = Asked([1] * 60, 5)
    engine.submit(asked.request)
    assert asked.result()[0] == continuation([1] * 60, 5)
    engine.stop(5)


def test_an_owner_that_raises_harms_no_other(engine: Engine) -> None:
    broken, good = Asked([1], 30), Asked([2], 30)

    def raises(event: Event) -> None:
        raise RuntimeError("Event loop is closed")

    broken.request.emit = raises
    engine.submit(broken.request)
    engine.submit(good.request)
    assert ended(good) == (continuation([2], 30), "length", None)
    until(lambda: engine.idle)


class Seen:
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
    model, seen = PageModel(pages=14, cp=2), Seen()
    engine = Engine(model, observer=seen)
    asked = [Asked([i] * 19, 9, id=f"r{i}") for i in range(3)] + [Asked([0] * 19, 1)]
    engine.submit_all([a.request for a in asked])
    engine.start()
    for a in asked:
        a.result()
    until(lambda: len(seen.steps) == model.steps)
    engine.stop(5)
    assert [(p.id, p.cached, p.new, p.total) for p in seen.steps[0].prompts] == [("r0", 0, 16, 19)]
    assert seen.steps[0].rows == (8, 8) and sum(seen.steps[0].pairs) == 16 * 17 / 2
    assert abs(seen.steps[0].pairs[0] - seen.steps[0].pairs[1]) <= 32
    assert all(sum(s.rows) == s.prefill_tokens + s.decode_tokens for s in seen.steps)
    assert all(0 < s.host_seconds <= s.seconds for s in seen.steps)
    assert [len(seen.times[kind]) for kind in ("started", "first_token", "token")] == [4, 4, 24]
    assert sorted(r.output_tokens for r in seen.requests) == [1, 9, 9, 9]
    assert all(
        r.reason == "length" and r.e2e_seconds >= r.queue_seconds + r.prefill_seconds >= 0 for r in seen.requests
    )
    assert sum(r.cached_tokens for r in seen.requests) == engine.status().prefix_hits > 0
    assert seen.preemptions == engine.status().preemptions


def test_an_observer_that_raises_harms_nobody(model: PageModel) -> None:
    class Broken(Seen):
        def step(self, report: StepReport) -> None:
            raise RuntimeError("no disk")

    engine = Engine(model, observer=Broken())
    engine.start()
    asked = Asked([1], 5)
    engine.submit(asked.request)
    assert asked.result()[0] == continuation([1], 5)
    engine.stop(5)


def test_a_shared_prefix_is_computed_once() -> None:
    """3000 tokens, asked 20 times at once: those that come later wait for the first one's pages."""
    prefix = [(n * n) % 250 for n in range(3000)]
    model, seen = PageModel(pages=1200, page_size=16, max_running=8, prefill_chunk=1024), Seen()
    engine = Engine(model, observer=seen)
    asked = [Asked([*prefix, i, i], 2) for i in range(20)]
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
    assert engine.idle and status.pages_cached > 180


def test_the_queue_has_an_end(model: PageModel) -> None:
    engine = Engine(model, max_queued=2)  # beside 4 that run
    engine.submit_all([Asked([i], 2).request for i in range(4)])
    with pytest.raises(QueueFull, match="4 requests run or wait already, 6 may"):
        engine.submit_all([Asked([5], 2).request for _ in range(3)])
    last = [Asked([i], 2) for i in (5, 6)]
    engine.submit_all([a.request for a in last])
    engine.start()
    for a in last:
        assert a.result()[0] == continuation(a.request.prompt, 2)
    with pytest.raises(ValueError, match="need 161 places, the cache has 160"):
        engine.submit(Asked([1] * 100, 62).request)
    engine.stop(5)


def test_requests_have_limits(model: PageModel) -> None:
    model.gate, model.max_running = threading.Semaphore(0), 1
    engine = Engine(model)
    slow, waits, fine = Asked([1], 90, timeout=0.2), Asked([2], 1, queue_timeout=0.1), Asked([3], 1, queue_timeout=60)
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
    assert engine.idle


def test_drain_ends_what_is_there_and_takes_nothing_new(model: PageModel, engine: Engine) -> None:
    model.gate = threading.Semaphore(0)
    asked = Asked([1], 10)
    engine.submit(asked.request)
    assert not engine.drain(0.05)
    with pytest.raises(EngineDead, match="stopping"):
        engine.submit(Asked([1], 1).request)
    model.gate.release(100)
    assert engine.drain(5)
    assert asked.result()[0] == continuation([1], 10)


def test_a_step_that_hangs_is_told() -> None:
    model = PageModel()
    model.gate = threading.Semaphore(0)
    engine = Engine(model, watchdog_seconds=0.05)
    assert engine.unhealthy_reason == "the engine is not running."
    engine.start()
    asked = Asked([1], 1)
    engine.submit(asked.request)
    until(lambda: engine.unhealthy_reason is not None)
    assert "a step has been running for" in str(engine.unhealthy_reason) and engine.alive
    model.gate.release(1)
    assert asked.result()[0] == continuation([1], 1)
    until(lambda: engine.unhealthy_reason is None)
    engine.stop(5)


class Digits:
    """Three digits, written as their characters' codes."""

    def __init__(self) -> None:
        self.taken: list[int] = []

    def mask(self) -> np.ndarray:
        words = np.zeros(-(-VOCAB // 32), np.uint32)
        for token in range(48, 58):
            words[token // 32] |= np.uint32(1 << token % 32)
        return words

    def accept(self, token: int) -> None:
        self.taken.append(token)

    @property
    def finished(self) -> bool:
        return len(self.taken) == 3


def test_a_grammar_leads_and_ends_its_request() -> None:
    engine = Engine(PageModel(draft_tokens=2))
    engine.start()
    grammar = Digits()
    asked, other = Asked([1, 2], 20, grammar=grammar), Asked([3], 20)
    engine.submit_all([asked.request, other.request])
    tokens, reason, stop = ended(asked)
    assert (reason, stop) == ("stop", None) and tokens == grammar.taken and all(48 <= t < 58 for t in tokens)
    assert ended(other)[0] == continuation([3], 20)

    class Breaks(Digits):
        def mask(self) -> np.ndarray:
            if len(self.taken) == 1:
                raise ValueError("no way on")
            return super().mask()

    broken, other = Asked([1, 2], 20, grammar=Breaks()), Asked([4], 20)
    engine.submit_all([broken.request, other.request])
    assert broken.result()[1] == Failed("The request's next token could not be prepared.", "internal")
    assert ended(other)[0] == continuation([4], 20)
    engine.stop(5)
    assert engine.idle


def test_no_end_before_min_tokens(engine: Engine) -> None:
    free = continuation([5], 12)
    even = frozenset(range(0, VOCAB, 2))
    asked = Asked([5], 40, even, min_tokens=4)
    engine.submit(asked.request)
    tokens, reason, stop = ended(asked)
    assert reason == "stop" and len(tokens) >= 5 and tokens[-1] == stop
    assert not set(tokens[:-1]) & even and set(free[:4]) & even, "the bans changed something"
    text = TextStream(byte_tokenizer(), [chr(t) for t in free if 32 <= t < 127])
    asked = Asked([5], 12, text=text, min_tokens=11)
    engine.submit(asked.request)
    assert len(ended(asked)[0]) >= 11


def test_scored_prompts(engine: Engine) -> None:
    prompt = [7, 1, 7] * 8
    engine.submit(first := Asked(prompt, 1).request)
    scored = Asked(prompt, 0, score_prompt=True)
    engine.submit(scored.request)
    assert ended(scored) == ([], "length", None)
    [event, _] = scored.all
    assert isinstance(event, PromptScored) and np.isnan(event.logprobs[0])
    assert event.logprobs[1:].tolist() == [logprob(prompt[:n], prompt[n]) for n in range(1, 24)]
    assert event.top_tokens.shape == event.top_logprobs.shape == (24, 20)
    after = Asked(prompt, 1)
    engine.submit(after.request)
    end = after.result()[1]
    assert isinstance(end, Finished) and end.cached_tokens == 20 and first.cached_tokens == 0


@pytest.mark.parametrize(
    ("prompt", "most", "options", "message"),
    [
        ([], 1, {}, "prompt"),
        ([1], 0, {}, "max_tokens: must be at least 1, got 0"),
        ([1], -1, {"score_prompt": True}, "max_tokens: must be at least 0"),
        ([1], 3, {"min_tokens": 4}, "min_tokens: must be 0 to max_tokens=3, got 4"),
    ],
)
def test_requests_that_can_not_be(prompt: list[int], most: int, options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Asked(prompt, most, **options)
