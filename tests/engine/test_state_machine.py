"""The engine under any arrivals, aborts, preemptions and failures, one step ahead or not: right tokens, no page lost or shared
wrongly."""

from __future__ import annotations

import collections
from typing import ClassVar

import numpy as np
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test
from numpy.typing import NDArray

from jax_mla_cp.batch.logit_bias import LogitBias
from jax_mla_cp.batch.step_request import SamplingParams
from jax_mla_cp.engine import Engine, Event, Failed, Finished, PromptLogprobs, Request, StepReport, Token
from jax_mla_cp.engine.observer import Observer
from jax_mla_cp.engine.text import TextStream
from tests.helpers.standin import VOCAB, PageModel, allowed, continuation, logprob, next_token

STOP = frozenset({3})


class Alternating:
    """A grammar: even and odd tokens take turns. Its mask is right only if every token has been accepted."""

    def __init__(self, last: int):
        self._last = last

    def mask(self) -> NDArray[np.uint32]:
        words = np.zeros(-(-VOCAB // 32), np.uint32)
        for token in range(1 - self._last % 2, VOCAB, 2):
            words[token // 32] |= np.uint32(1 << token % 32)
        return words

    def accept(self, token: int) -> None:
        self._last = token

    @property
    def finished(self) -> bool:
        return False


def alternating(prompt: list[int], count: int) -> list[int]:
    """The expected output of a request with this grammar."""
    none = np.zeros(0, np.int32), np.zeros(0, np.float32), np.zeros(0, np.float32)
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(allowed(next_token(tokens), LogitBias(*none, Alternating(tokens[-1]).mask())))
        if tokens[-1] in STOP:
            break
    return tokens[len(prompt) :]


class Modes(Observer):
    """Counts the steps of each mode."""

    def __init__(self) -> None:
        self.overlapped = self.synchronous = 0

    def step(self, report: StepReport) -> None:
        self.overlapped += report.overlapped
        self.synchronous += not report.overlapped


class Anything(RuleBasedStateMachine):
    """Drives an engine by hand. Prompts are cut from two texts, so that many share pages, some of them only the tokens of a
    page."""

    seen: ClassVar[collections.Counter[str]] = collections.Counter()
    """Over all examples, how often each thing happened that the assertions are about."""

    @initialize(
        dp=st.integers(1, 2),
        page_size=st.sampled_from([1, 3, 8]),
        running=st.integers(1, 5),
        chunk=st.integers(1, 20),
        drafts=st.sampled_from([0, 0, 0, 1, 3]),
        room=st.integers(0, 60),
        overlap=st.sampled_from([True, True, False]),
        runs_late=st.booleans(),
    )
    def begin(
        self,
        dp: int,
        page_size: int,
        running: int,
        chunk: int,
        drafts: int,
        room: int,
        overlap: bool,
        runs_late: bool,
    ) -> None:
        pages = -(-(70 + room) // page_size)
        self.model = PageModel(
            dp=dp, pages=pages, page_size=page_size, max_running=running, prefill_chunk=chunk, draft_tokens=drafts
        )
        self.model.runs_late = runs_late
        self.modes = Modes()
        self.engine = Engine(self.model, overlap=overlap, observer=self.modes)
        self.scheduler = self.engine._scheduler
        self.requests: list[Request] = []
        self.events: dict[Request, list[Event]] = {}
        self.gone: set[Request] = set()

    @rule(
        text=st.integers(0, 1),
        length=st.integers(1, 50),
        change=st.integers(0, 60),
        most=st.integers(0, 20),
        salt=st.sampled_from(["", "", "", "x"]),
        kind=st.sampled_from(["plain", "plain", "plain", "plain", "score", "grammar"]),
    )
    def arrives(self, text: int, length: int, change: int, most: int, salt: str, kind: str) -> None:
        prompt = [(n * 7) % 5 + text for n in range(length)]
        if change < length:
            prompt[change] = 200
        made = Request(
            prompt,
            most if kind == "score" else max(most, 1),
            SamplingParams(),
            STOP,
            TextStream(None),
            lambda event: self.events[made].append(event),
            cache_salt=salt,
            prompt_logprobs=kind == "score",
            grammar=Alternating(prompt[-1]) if kind == "grammar" else None,
        )
        self.events[made] = []
        self.requests.append(made)
        self.engine.submit(made)

    @rule(which=st.integers(0, 1000))
    def is_aborted(self, which: int) -> None:
        if self.requests:
            chosen = self.requests[which % len(self.requests)]
            self.engine.abort(chosen)
            if not self.has_ended(chosen):
                self.gone.add(chosen)

    @rule(times=st.integers(1, 6))
    def steps(self, times: int) -> None:
        for _ in range(times):
            self.step()

    @rule(newcomer=st.booleans())
    def a_step_fails(self, newcomer: bool) -> None:
        """The step fails, and with it the one in flight beside it; the cache is made anew once.

        Args:
          newcomer: a request comes between the two.
        """
        if newcomer:
            self.step()
            self.arrives(text=0, length=2, change=60, most=5, salt="", kind="plain")
        resets, self.model.fail_next = self.model.resets, 1
        for _ in range(100):
            if not self.model.fail_next or not self.has_work:
                break
            self.step()
        if self.model.fail_next:
            self.model.fail_next = 0
            return
        while self.engine._pipeline and self.model.resets == resets:  # its error shows late
            self.step()
        assert self.model.resets == resets + 1
        assert self.engine._failures == 1
        self.engine._failures = 0
        self.seen["failed steps"] += 1

    @property
    def has_work(self) -> bool:
        return bool(self.engine._submitted or self.engine._aborted or self.engine._has_work)

    def has_ended(self, request: Request) -> bool:
        return any(isinstance(event, Finished | Failed) for event in self.events[request])

    def step(self) -> None:
        """One turn of the engine's loop."""
        if not self.has_work:
            return
        assert self.engine._receive()
        if self.engine._has_work:
            self.engine._step()
        assert self.engine._dead is None
        self.gone.update(r for r in self.requests if any(isinstance(e, Failed) for e in self.events[r]))
        if not self.model.is_broken:
            self.what_is_written_is_right()

    def what_is_written_is_right(self) -> None:
        """Latents that a request has computed are there, whoever else has written meanwhile."""
        for g, group in enumerate(self.scheduler.groups):
            for r in group.running:
                slots = self.model.slots_of(r.pages, r.num_verified_tokens)
                assert r.num_verified_tokens <= r.num_known_tokens
                assert r.num_computed_tokens <= r.max_slots
                assert self.model.slots[g, slots].tolist() == r.tokens[: r.num_verified_tokens]
                self.seen["computed"] += r.num_verified_tokens

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
            assert len({r.slot for r in group.running}) == len(group.running)

    def teardown(self) -> None:
        if not hasattr(self, "engine"):
            return
        for _ in range(4000):
            if not self.has_work:
                break
            self.step()
        assert not self.has_work, "no end"
        self.pages_add_up()
        self.seen["preemptions"] += self.scheduler.stats.preemptions
        self.seen["prefix hits"] += self.scheduler.stats.prefix_hits
        self.seen["overlapped steps"] += self.modes.overlapped
        self.seen["synchronous steps"] += self.modes.synchronous
        self.seen["finished"] += len(self.requests) - len(self.gone)
        self.seen["aborted or failed"] += len(self.gone)
        for r in self.requests:
            tokens = [e.token for e in self.events[r] if isinstance(e, Token)]
            want = (
                continuation(r.prompt, r.max_tokens, STOP) if r.grammar is None else alternating(r.prompt, r.max_tokens)
            )
            assert tokens == (want[: len(tokens)] if r in self.gone else want)
            ends = [n for n, e in enumerate(self.events[r]) if isinstance(e, Finished | Failed)]
            assert ends in ([len(self.events[r]) - 1], [] if r in self.gone else None), "one end, and nothing after it"
            self.seen["ended early"] += len(want) < r.max_tokens
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
        "aborted or failed",
        "computed",
        "ended early",
        "failed steps",
        "finished",
        "overlapped steps",
        "preemptions",
        "prefix hits",
        "scored prompts",
        "shared pages",
        "synchronous steps",
    }
