"""The scheduler under any arrivals, aborts, preemptions and failures: right tokens, no page lost or shared wrongly."""

from __future__ import annotations

import collections
import functools
import sys
from collections.abc import Callable
from typing import Any, ClassVar

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

from jax_mla_cp.batch.step_request import SamplingParams
from jax_mla_cp.engine import Event, Finished, PromptLogprobs, Request, Token
from jax_mla_cp.engine.group_scheduler import ScheduledRequest
from jax_mla_cp.engine.output_processor import process_output
from jax_mla_cp.engine.scheduler import Scheduler
from jax_mla_cp.engine.text import TextStream
from tests.helpers.standin import PageModel, continuation, logprob

STOP = frozenset({3})


def request(
    prompt: list[int], most: int, emit: Callable[[Event], None] = lambda event: None, **options: Any
) -> Request:
    return Request(prompt, most, SamplingParams(), STOP, TextStream(None), emit, **options)


def endless(prompt: list[int], most: int, **options: Any) -> Request:
    """Without a stop token, so that `most` is what it gets."""
    made = request(prompt, most, **options)
    made.stop_tokens = frozenset()
    return made


def scheduler_of(model: PageModel) -> Scheduler:
    return Scheduler(
        groups=model.dp,
        pages_per_group=model.pages_per_group,
        page_size=model.page_size,
        max_running=model.max_running,
        prefill_chunk=model.prefill_chunk,
        draft_tokens=model.draft_tokens,
    )


def run(scheduler: Scheduler, model: PageModel) -> list[list[ScheduledRequest]]:
    """One step, as the engine does it."""
    planned = scheduler.schedule()
    assert any(planned) or not scheduler.has_requests, "requests wait and none runs"
    output = model.step([[s.step_request() for s in group] for group in planned])
    for group, results in zip(planned, output.results, strict=True):
        for scheduled, result in zip(group, results, strict=True):
            events = process_output(scheduled, result)
            scheduler.commit_pages(scheduled.request)
            if events and isinstance(events[-1], Finished):
                scheduler.remove(scheduled.request)
            for event in events:
                scheduled.request.emit(event)
    return planned


class Anything(RuleBasedStateMachine):
    """Prompts are cut from two texts, so that many share pages, some of them only the tokens of a page."""

    seen: ClassVar[collections.Counter[str]] = collections.Counter()
    """Over all examples, how often each thing happened that the assertions are about."""

    @initialize(
        dp=st.integers(1, 2),
        page_size=st.sampled_from([1, 3, 8]),
        running=st.integers(1, 5),
        chunk=st.integers(1, 20),
        drafts=st.sampled_from([0, 0, 1, 3]),
        room=st.integers(0, 60),
    )
    def begin(self, dp: int, page_size: int, running: int, chunk: int, drafts: int, room: int) -> None:
        pages = -(-(70 + room) // page_size)
        self.model = PageModel(
            dp=dp, pages=pages, page_size=page_size, max_running=running, prefill_chunk=chunk, draft_tokens=drafts
        )
        self.scheduler = scheduler_of(self.model)
        self.requests: list[Request] = []
        self.events: dict[Request, list[Event]] = {}
        self.gone: set[Request] = set()

    @rule(
        text=st.integers(0, 1),
        length=st.integers(1, 50),
        change=st.integers(0, 60),
        most=st.integers(0, 20),
        salt=st.sampled_from(["", "", "", "x"]),
        score=st.sampled_from([False, False, True]),
    )
    def arrives(self, text: int, length: int, change: int, most: int, salt: str, score: bool) -> None:
        prompt = [(n * 7) % 5 + text for n in range(length)]
        if change < length:
            prompt[change] = 200
        made = request(prompt, most if score else max(most, 1), cache_salt=salt, prompt_logprobs=score)
        made.emit = self.events.setdefault(made, []).append
        self.requests.append(made)
        self.scheduler.add(made)

    @rule(which=st.integers(0, 1000))
    def is_aborted(self, which: int) -> None:
        if self.requests:
            chosen = self.requests[which % len(self.requests)]
            if self.scheduler.remove(chosen):
                self.gone.add(chosen)

    @rule(times=st.integers(1, 6))
    def steps(self, times: int) -> None:
        for _ in range(times):
            if self.scheduler.has_requests:
                run(self.scheduler, self.model)
                self.what_is_written_is_right()

    @rule()
    def a_step_fails(self) -> None:
        if not self.scheduler.has_requests:
            return
        self.model.fail_next = 1
        planned = self.scheduler.schedule()
        with pytest.raises(RuntimeError, match="fell over"):
            self.model.step([[s.step_request() for s in group] for group in planned])
        for scheduled in [s for group in planned for s in group]:
            self.scheduler.remove(scheduled.request)
            self.gone.add(scheduled.request)
        self.scheduler.reset_cache()
        self.model.reset()

    def what_is_written_is_right(self) -> None:
        """What a request has computed is there, whoever else has written meanwhile."""
        for g, group in enumerate(self.scheduler.groups):
            for r in group.running:
                slots = self.model.slots_of(r.pages, r.num_computed_tokens)
                assert self.model.slots[g, slots].tolist() == r.tokens[: r.num_computed_tokens]
                self.seen["computed"] += r.num_computed_tokens

    @invariant()
    def pages_add_up(self) -> None:
        for group in self.scheduler.groups:
            pool = group.page_pool
            used = collections.Counter(page for r in group.running for page in r.pages)
            assert pool.num_free + pool.num_cached + len(used) == pool.num_pages
            assert all(pool._refcount[page] == times for page, times in used.items())
            for page, times in used.items():
                if times > 1:
                    self.seen["shared pages"] += 1
                    assert page in pool._hash_by_page, "a page that is not committed is shared"
            salts: dict[int, set[str]] = {}
            for r in group.running:
                for page in r.pages:
                    salts.setdefault(page, set()).add(r.cache_salt)
            assert all(len(found) == 1 for found in salts.values()), "shared by requests with different salts"

    def teardown(self) -> None:
        if not hasattr(self, "scheduler"):
            return
        for _ in range(4000):
            if not self.scheduler.has_requests:
                break
            run(self.scheduler, self.model)
        assert not self.scheduler.has_requests, "no end"
        self.pages_add_up()
        self.seen["preemptions"] += self.scheduler.stats.preemptions
        self.seen["prefix hits"] += self.scheduler.stats.prefix_hits
        self.seen["finished"] += len(self.requests) - len(self.gone)
        self.seen["aborted or failed"] += len(self.gone)
        for r in self.requests:
            tokens = [e.token for e in self.events[r] if isinstance(e, Token)]
            want = continuation(r.prompt, r.max_tokens, STOP)
            assert tokens == (want[: len(tokens)] if r in self.gone else want)
            scored = [e for e in self.events[r] if isinstance(e, PromptLogprobs)]
            assert len(scored) == (r.prompt_logprobs and (r not in self.gone or bool(scored)))
            for event in scored:
                self.seen["scored prompts"] += 1
                assert self.events[r][0] is event
                assert event.logprobs.tolist()[1:] == [
                    logprob(r.prompt[:n], r.prompt[n]) for n in range(1, len(r.prompt))
                ]
                assert len(event.top_tokens) == len(event.top_logprobs) == len(r.prompt)


def test_anything() -> None:
    Anything.seen.clear()
    run_state_machine_as_test(
        Anything,
        settings=settings(
            max_examples=300, stateful_step_count=25, deadline=None, suppress_health_check=list(HealthCheck)
        ),
    )
    assert set(+Anything.seen) == {
        "computed",
        "shared pages",
        "preemptions",
        "prefix hits",
        "finished",
        "aborted or failed",
        "scored prompts",
    }


def finish(scheduler: Scheduler, model: PageModel, most: int = 2000) -> list[list[list[ScheduledRequest]]]:
    steps = []
    while scheduler.has_requests:
        steps.append(run(scheduler, model))
        assert len(steps) < most, "no end"
    return steps


def test_several_prompts_share_a_step_beside_all_decodes() -> None:
    model = PageModel(max_running=8, prefill_chunk=16)
    scheduler = scheduler_of(model)
    decoding = [request([i, 1], 30) for i in range(3)]
    for r in decoding:
        scheduler.add(r)
    run(scheduler, model)
    prompts = [request([9, i] * 3, 1) for i in range(2)] + [request([8] * 20, 1)]
    for r in prompts:
        scheduler.add(r)
    [step] = run(scheduler, model)
    assert [(s.request, s.num_tokens) for s in step] == [
        *((r, 1) for r in decoding),
        *zip(prompts, (6, 6, 4), strict=True),
    ]


def test_the_youngest_gives_way_and_comes_back_in_its_place() -> None:
    model = PageModel(pages=12, page_size=4, max_running=3, prefill_chunk=8)
    scheduler = scheduler_of(model)
    ended: list[Request] = []
    requests = []
    for i in range(5):
        made = endless(
            [i, 9, i], 30, emit=lambda e, i=i: ended.append(requests[i]) if isinstance(e, Finished) else None
        )  # type: ignore[misc]
        requests.append(made)
        scheduler.add(made)
    steps = finish(scheduler, model)
    assert ended == requests, "oldest first served"
    assert scheduler.stats.preemptions > 0
    assert all(r.tokens == [*r.prompt, *continuation(r.prompt, 30)] for r in requests)
    assert len(steps) >= 30
    assert all(any(s.request is requests[0] for s in step[0]) for step in steps[:30]), "the oldest never waits"


def test_who_gave_way_waits_for_room_for_all_its_tokens() -> None:
    """When the first one ends, there is room for a chunk of the youngest, but not for all that it had: it would give way
    a second time."""
    model = PageModel(pages=12, page_size=4, max_running=4, prefill_chunk=8)
    scheduler = scheduler_of(model)
    for i, (length, most) in enumerate(((1, 17), (13, 34), (13, 29))):
        scheduler.add(endless([i] * length, most))
    finish(scheduler, model)
    assert scheduler.stats.preemptions == 1


def test_nobody_starts_on_the_pages_that_running_requests_need_next() -> None:
    model = PageModel(pages=4, page_size=4, max_running=2, prefill_chunk=16)
    scheduler = scheduler_of(model)
    scheduler.add(endless([1] * 8, 8))
    run(scheduler, model)
    scheduler.add(endless([2] * 4, 4))
    finish(scheduler, model)
    assert scheduler.stats.preemptions == 0


def test_a_request_goes_where_its_pages_are_and_else_where_there_is_room() -> None:
    model = PageModel(dp=2, pages=20, page_size=4, max_running=4, prefill_chunk=32)
    scheduler = scheduler_of(model)
    first, other, alike, last = (endless(p, 4) for p in ([1] * 24, [2] * 16, [1] * 24 + [5], [3] * 4))
    scheduler.add(first)
    run(scheduler, model)
    for made in (other, alike, last):
        scheduler.add(made)
    run(scheduler, model)
    assert other.group == last.group != first.group == alike.group
    assert (alike.cached_tokens, other.cached_tokens) == (24, 0)


def test_a_long_prompt_at_the_head_is_not_overtaken_for_ever() -> None:
    """It needs more pages than are left beside short ones, of which more keep coming."""
    model = PageModel(pages=20, page_size=4, max_running=4, prefill_chunk=80)
    scheduler = scheduler_of(model)
    for i in range(3):
        scheduler.add(request([i] * 20, 8))
    run(scheduler, model)
    done: list[Event] = []
    scheduler.add(request([7] * 70, 1, emit=done.append))
    for i in range(60):
        scheduler.add(request([i, i, 5], 8))
        run(scheduler, model)
        if done:
            break
    assert done, "starved"


def test_drafts_shrink_before_anyone_gives_way() -> None:
    """As many pages as two requests need without drafts: they finish without preemption, and use drafts where they can."""
    model = PageModel(pages=18, page_size=4, max_running=2, prefill_chunk=16, draft_tokens=4)
    scheduler = scheduler_of(model)
    for i in range(2):
        scheduler.add(endless([i] * 8, 29))
    finish(scheduler, model)
    assert scheduler.stats.preemptions == 0
    assert {drafts for drafts, _ in model.accepted} >= {0, 4}, "some were shrunk, some were not"


@functools.cache
def visits(requests: int) -> int:
    """Python function calls that schedule and take 20 decode steps of so many requests."""
    model = PageModel(pages=requests * 20, page_size=4, max_running=requests, prefill_chunk=8 * requests)
    scheduler = scheduler_of(model)
    for i in range(requests):
        scheduler.add(endless([i % 200, i // 200, 1, 2], 60))
    run(scheduler, model)
    calls = 0

    def count(frame: Any, event: str, arg: Any) -> None:
        nonlocal calls
        calls += event in ("call", "c_call") and "standin" not in frame.f_code.co_filename

    sys.setprofile(count)
    try:
        for _ in range(20):
            run(scheduler, model)
    finally:
        sys.setprofile(None)
    return calls


def test_the_work_of_a_step_is_linear_in_its_requests() -> None:
    small, large = visits(16), visits(64)
    assert large < 4.2 * small
