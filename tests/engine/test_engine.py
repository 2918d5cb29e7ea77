"""The engine: every request gets its own right answer, whatever arrives, ends or fails around it; no page is lost."""

from __future__ import annotations

import queue
import threading
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jax_mla_cp.batch import Sampling
from jax_mla_cp.engine import Engine, EngineDead, Event, Failed, Finished, Request, Token
from jax_mla_cp.engine.pages import Pages
from jax_mla_cp.engine.scheduler import Scheduler
from jax_mla_cp.engine.text import TextStream
from tests.byte_tokenizer import byte_tokenizer
from tests.engine.standin import PageModel, continuation

STOP = frozenset({3})


class Asked:
    """A request and the events it got."""

    def __init__(
        self, prompt: list[int], max_tokens: int, stop: frozenset[int] = frozenset(), text: TextStream | None = None
    ):
        self.events: queue.Queue[Event] = queue.Queue()
        self.request = Request(
            prompt, max_tokens, Sampling(temperature=0), stop, text or TextStream(None), self.events.put
        )

    def result(self, timeout: float = 10) -> tuple[list[int], Event]:
        tokens = []
        while True:
            event = self.events.get(timeout=timeout)
            if not isinstance(event, Token):
                return tokens, event
            tokens.append(event.token)


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


def until(condition: object, seconds: float = 5) -> None:
    deadline = time.monotonic() + seconds
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < deadline, "did not come true in time"
        time.sleep(0.005)


requests = st.lists(
    st.tuples(
        st.integers(1, 70),  # prompt tokens
        st.integers(1, 30),  # max_tokens
        st.integers(0, 12),  # arrives before this step
        st.one_of(st.none(), st.integers(0, 20)),  # is aborted so many steps later
    ),
    min_size=1,
    max_size=12,
)


@given(
    requests, st.integers(1, 3), st.integers(1, 20), st.integers(1, 5), st.sampled_from([1, 3, 16]), st.integers(0, 4)
)
@settings(max_examples=150, deadline=None)
def test_any_arrivals_and_aborts(
    asked: list[tuple[int, int, int, int | None]], dp: int, chunk: int, running: int, page_size: int, drafts: int
) -> None:
    """Drives the scheduler step by step: right tokens, all pages back, and progress in every step."""
    model = PageModel(
        dp=dp, pages=-(-100 // page_size) + 2, page_size=page_size, max_running=running, prefill_chunk=chunk,
        draft_tokens=drafts,
    )  # fmt: skip
    scheduler = Scheduler(
        groups=dp, pages_per_group=model.pages_per_group, page_size=page_size, max_running=running, prefill_chunk=chunk
    )
    got: list[list[Event]] = [[] for _ in asked]
    made = [
        Request([(7 * i + t) % 251 for t in range(length)], most, Sampling(), STOP, TextStream(None), got[i].append)
        for i, (length, most, _, _) in enumerate(asked)
    ]
    aborted, step = set(), 0
    while step <= 33 or scheduler.busy:
        for i, (_, _, arrival, abort) in enumerate(asked):
            if arrival == step:
                scheduler.add(made[i])
            if abort is not None and arrival + abort == step and not (got[i] and isinstance(got[i][-1], Finished)):
                scheduler.remove(made[i])
                aborted.add(i)
        planned = scheduler.schedule()
        assert any(planned) or not scheduler.busy, "requests wait and nothing runs"
        for group, outcomes in zip(planned, model.step([[s.work() for s in g] for g in planned]), strict=True):
            for scheduled, outcome in zip(group, outcomes, strict=True):
                request = scheduled.request
                scheduler.advance(scheduled, max(len(outcome.sampled) - 1, 0))
                for result in outcome.sampled:
                    ends = result.token in STOP or len(request.tokens) + 1 == len(request.prompt) + request.max_tokens
                    if ends:
                        scheduler.remove(request)
                    request.append(
                        Token(result.token, "", 0, result.top_tokens, result.top_logprobs), "stop" if ends else None
                    )
                    if ends:
                        break
                request.drafts = outcome.drafts[: max(request.left - 1, 0)]
        step += 1
        assert step < 2000, "no progress"
    for i, request in enumerate(made):
        tokens = [e.token for e in got[i] if isinstance(e, Token)]
        want = continuation(request.prompt, request.max_tokens, STOP)
        assert tokens == (want[: len(tokens)] if i in aborted else want)
    assert all(pages.free == pages.count for pages in scheduler.pages)


def test_many_threads(engine: Engine) -> None:
    asked = [Asked([i, 2, 3] * (1 + i % 9), 5 + i % 7) for i in range(40)]
    threads = [threading.Thread(target=engine.submit, args=(a.request,)) for a in asked]
    for thread in threads:
        thread.start()
    for a in asked:
        tokens, end = a.result()
        assert tokens == continuation(a.request.prompt, a.request.max_tokens)
        assert end == Finished("length", "")
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
            assert a.result() == (want[:most], Finished("length", ""))
        for token, a in zip(want, asked[8:16], strict=False):
            assert a.result() == (want[: want.index(token) + 1], Finished("stop", ""))
        assert asked[-1].result()[0] == want[: want.index(ord(stop)) + 1]
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


def test_a_failed_step_fails_its_requests_and_the_engine_goes_on(model: PageModel, engine: Engine) -> None:
    model.gate = threading.Semaphore(0)
    running, waiting = [Asked([i], 150) for i in range(1)], Asked([9] * 20, 30)
    for asked in [*running, waiting]:  # 160 tokens of pages: the second waits for the first
        engine.submit(asked.request)
    model.gate.release(2)
    until(lambda: running[0].events.qsize() == 2)
    model.fail_next = 1
    model.gate.release(100)
    assert isinstance(running[0].result()[1], Failed)
    assert waiting.result()[0] == continuation([9] * 20, 30)
    assert engine.alive


def test_repeated_failures_end_the_engine(model: PageModel, engine: Engine) -> None:
    model.fail_next = 3
    for _ in range(3):
        asked = Asked([1], 2)
        engine.submit(asked.request)
        assert isinstance(asked.result()[1], Failed)
    until(lambda: not engine.alive)
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
    assert good.result() == (continuation([2], 30), Finished("length", ""))
    until(lambda: engine.free_pages == engine.total_pages)
