"""The scheduler: who runs, who waits, who gives way, and where."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any

from jax_mla_cp.batch.step_request import SamplingParams
from jax_mla_cp.engine import Event, Finished, Request
from jax_mla_cp.engine.output_processor import process_output
from jax_mla_cp.engine.scheduled_request import ScheduledRequest
from jax_mla_cp.engine.scheduler import Scheduler
from jax_mla_cp.engine.text import TextStream
from tests.helpers.standin import PageModel, continuation

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
    groups = [[scheduled.prepare() for scheduled in group] for group in planned]
    output = model.step([[part.step_request for part in group] for group in groups])
    for group, results in zip(groups, output.results, strict=True):
        for part, result in zip(group, results, strict=True):
            part.advance()
            events = process_output(part, result)
            scheduler.commit_pages(part.request)
            if events and isinstance(events[-1], Finished):
                scheduler.remove(part.request)
            for event in events:
                part.request.emit(event)
    return planned


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
