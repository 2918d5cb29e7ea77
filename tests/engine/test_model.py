"""The engine on a real model, context parallel: reuse, preemption and recovery change no token."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from jax_mla_cp.batch.step_request import SamplingParams, StepRequest
from jax_mla_cp.engine import Engine, Failed, Finished, Observer, StepReport
from jax_mla_cp.step.results import RunnerOutput
from tests.helpers.engine_requests import RecordedRequest, is_idle
from tests.helpers.speculative import CONFIG, OneBucket, model
from tests.helpers.standin import PendingStep

PREFIX = np.random.default_rng(5).integers(0, CONFIG.vocab_size, 27).tolist()
PROMPTS = [[*PREFIX, *tail] for tail in ([1], [2, 3], [1], [4, 5, 6, 7, 8, 9, 1], [2, 3, 5])]
COUNT = 14
HOW = [SamplingParams(temperature=0), SamplingParams(temperature=1.0, seed=7)]


@functools.cache
def runner(draft_tokens: int) -> OneBucket:
    return OneBucket(model("tp=2,cp=2", "tp"), draft_tokens)


class Few:
    """A runner with fewer pages or places, and steps that raise after they have run."""

    def __init__(self, steps: OneBucket, *, pages: int | None = None, running: int = 3, fail_at: int | None = None):
        self._steps, self._fail_at, self._count = steps, fail_at, 0
        self.pages_per_group = pages or steps.pages_per_group
        self.max_running = running
        steps.reset()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._steps, name)

    def dispatch(self, groups: Sequence[Sequence[StepRequest]]) -> PendingStep:
        step = self._steps.dispatch(groups)

        def result() -> RunnerOutput:
            output = step.result()
            self._count += 1
            if self._count == self._fail_at:
                self._steps._pages.delete()  # as after an error on the device: the donated cache is gone
                raise RuntimeError("the device stopped")
            return output

        return PendingStep(result)


def ask(
    steps: Few,
    prompts: Sequence[Sequence[int]],
    first: int = 0,
    salts: bool = False,
    observer: Observer | None = None,
) -> tuple[list[RecordedRequest], Engine]:
    """All at once; with `salts`, none may use another's pages."""
    engine = Engine(steps, observer=observer)
    asked = [RecordedRequest(prompt, COUNT, cache_salt=str(i) if salts else "") for i, prompt in enumerate(prompts)]
    for i, a in enumerate(asked, first):
        a.request.sampling = HOW[i % 2]
    engine.submit_all([a.request for a in asked])
    engine.start()
    for a in asked:
        a.result(120)
    engine.stop(60)
    return asked, engine


def tokens(asked: Sequence[RecordedRequest]) -> list[list[int]]:
    return [a.request.tokens[len(a.request.prompt) :] for a in asked]


@functools.cache
def alone(draft_tokens: int) -> list[list[int]]:
    return [tokens(ask(Few(runner(draft_tokens)), [prompt], i)[0])[0] for i, prompt in enumerate(PROMPTS)]


@pytest.mark.parametrize("draft_tokens", [0, 2])
def test_a_reused_prefix_gives_the_same_tokens(draft_tokens: int) -> None:
    asked, engine = ask(Few(runner(draft_tokens)), PROMPTS)
    assert tokens(asked) == alone(draft_tokens) == alone(0)
    cached = [a.all[-1].cached_tokens for a in asked if isinstance(a.all[-1], Finished)]
    assert cached[0] == 0 and min(cached[1:]) >= 24
    assert is_idle(engine) and engine.status().prefix_hits == sum(cached)


@pytest.mark.parametrize("draft_tokens", [0, 2])
def test_who_gave_way_goes_on_with_the_same_tokens(draft_tokens: int) -> None:
    asked, engine = ask(Few(runner(draft_tokens), pages=24), PROMPTS, salts=True)
    assert engine.status().preemptions > 0 and is_idle(engine)
    assert tokens(asked) == alone(0)


def test_a_step_that_raises_after_dispatch() -> None:
    """The cache that it was given is gone, and with it the pages that those who come next could have reused."""
    steps = Few(runner(0), fail_at=5, running=4)
    asked, engine = ask(steps, PROMPTS)
    failed = [isinstance(a.all[-1], Failed) for a in asked]
    assert True in failed and False in failed
    for a, lost, want in zip(asked, failed, alone(0), strict=True):
        got = tokens([a])[0]
        assert got == (want[: len(got)] if lost else want)
    assert is_idle(engine)


def test_a_work_that_is_refused_concerns_its_request_alone() -> None:
    """A token that no vocabulary has, in the middle of the others' steps. The server would not let it through."""
    prompts = [*PROMPTS[:2], [*PREFIX, CONFIG.vocab_size], PROMPTS[2]]
    asked, engine = ask(Few(runner(0)), prompts)
    assert isinstance(asked[2].all[-1], Failed) and asked[2].all[-1].kind == "internal"
    assert tokens([asked[0], asked[1]]) == alone(0)[:2] and isinstance(asked[3].all[-1], Finished)
    assert is_idle(engine)


class Damaged(Few):
    """A runner whose devices' page table changes by itself before a step."""

    def __init__(self, steps: OneBucket, *, at: int):
        super().__init__(steps, running=4)
        self._dispatched, self._at = 0, at

    def dispatch(self, groups: Sequence[Sequence[StepRequest]]) -> PendingStep:
        self._dispatched += 1
        if self._dispatched == self._at:
            self._steps._page_table = self._steps._page_table.at[0, 0].add(1)
        return super().dispatch(groups)


def test_another_page_table_on_the_devices_is_a_failed_step(caplog: pytest.LogCaptureFixture) -> None:
    """Nobody gets a token that came of it; the table is sent whole, and the others are computed again."""
    asked, engine = ask(Damaged(runner(0), at=5), PROMPTS)
    assert "PageTableLost: the page table of dp group 0 is not the host's" in caplog.text
    failed = [isinstance(a.all[-1], Failed) for a in asked]
    assert True in failed and False in failed
    for a, lost, want in zip(asked, failed, alone(0), strict=True):
        got = tokens([a])[0]
        assert got == (want[: len(got)] if lost else want)
    assert is_idle(engine) and engine.unhealthy_reason == "the engine is not running."


class Reported(Observer):
    def __init__(self) -> None:
        self.steps: list[StepReport] = []

    def step(self, report: StepReport) -> None:
        self.steps.append(report)


def test_the_runner_reports_the_load_of_each_rank() -> None:
    seen = Reported()
    ask(Few(runner(2)), PROMPTS, observer=seen)
    assert seen.steps and [(p.cached, p.new) for p in seen.steps[0].prefills] == [(0, 10)]
    assert seen.steps[0].rank_tokens == (5, 5) and sum(seen.steps[0].rank_pairs) == 10 * 11 / 2
    assert all(sum(s.rank_tokens) == s.prefill_tokens + s.decode_tokens for s in seen.steps)
