"""A stand-in for the runner. It remembers only the content of its pages: wrong pages or positions give wrong tokens."""

from __future__ import annotations

import collections
import dataclasses
import threading
from collections.abc import Callable, Sequence

import numpy as np

from jax_mla_cp.batch.logit_bias import LogitBias
from jax_mla_cp.batch.step_request import StepRequest
from jax_mla_cp.batch.zigzag import loads
from jax_mla_cp.step.compile_progress import CompileProgress
from jax_mla_cp.step.results import RunnerOutput, SampledToken, StepResult, TokenLogprobs

VOCAB = 251


def next_token(tokens: Sequence[int]) -> int:
    """The token that follows: a function of all tokens and their positions."""
    value = 7
    for token in tokens:
        value = (value * 31 + token + 1) % 1_000_003
    return value % VOCAB


def continuation(prompt: Sequence[int], count: int, stop: frozenset[int] = frozenset()) -> list[int]:
    """The expected output of a request."""
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(next_token(tokens))
        if tokens[-1] in stop:
            break
    return tokens[len(prompt) :]


def guesses(tokens: Sequence[int], count: int) -> list[int]:
    """Drafts, of which about every third is wrong."""
    seen = list(tokens)
    for _ in range(count):
        true = next_token(seen)
        seen.append(true if (true + len(seen)) % 3 else (true + 1) % VOCAB)
    return seen[len(tokens) :]


def allowed(token: int, bias: LogitBias | None) -> int:
    """The token, or if it is banned, the next one that is not."""
    if bias is None:
        return token
    never = set(bias.tokens[bias.add == -np.inf].tolist())
    candidates = ((token + n) % VOCAB for n in range(VOCAB))
    mask = np.full(-(-VOCAB // 32), 0xFFFFFFFF, np.uint32) if bias.mask is None else bias.mask
    return next(t for t in candidates if t not in never and int(mask[t // 32]) >> t % 32 & 1)


def logprob(before: Sequence[int], token: int) -> float:
    """The log-probability of a token after others."""
    return -((token - next_token(before)) % VOCAB) / 8


NOTHING, STALE = -1, -2


class PendingStep:
    """A dispatched step of `PageModel`."""

    def __init__(self, run: Callable[[], RunnerOutput]):
        self._run = run
        self._output: RunnerOutput | None = None
        self._error: Exception | None = None

    def run(self) -> None:
        try:
            self._output = self._run()
        except Exception as error:
            self._error = error

    def result(self) -> RunnerOutput:
        if self._output is None and self._error is None:
            self.run()
        if self._error is not None:
            raise self._error
        assert self._output is not None
        return self._output


def _copy(request: StepRequest) -> StepRequest:
    """A copy: a real runner has read the lists when `dispatch` returns."""
    return dataclasses.replace(request, tokens=list(request.tokens), pages=list(request.pages))


class PageModel:
    """A `StepRunner` that keeps tokens in pages as the real one keeps latents, and checks the engine's side of the contract.

    With drafts, a slot also remembers the token after its own, as the MTP layer's latent does. What a step writes after the
    last token, or leaves in a page that it begins, is as wrong as in the real cache.
    """

    def __init__(
        self,
        *,
        dp: int = 1,
        cp: int = 1,
        pages: int = 40,
        page_size: int = 4,
        max_running: int = 4,
        prefill_chunk: int = 16,
        draft_tokens: int = 0,
    ):
        self.dp, self.cp, self.pages_per_group, self.page_size = dp, cp, pages, page_size
        self.max_running, self.prefill_chunk = max_running, prefill_chunk
        self.draft_tokens = draft_tokens
        self.accepted: collections.Counter[tuple[int, int]] = collections.Counter()
        """Histogram of verifications: (drafts, accepted drafts) -> times."""
        self.fail_next = 0
        self.refused: int | None = None
        """A token: requests with it are invalid."""
        self.steps = 0
        """Steps that succeeded."""
        self.runs_ahead = not draft_tokens
        self.runs_late = True
        """A dispatched step runs when its result is asked for. False: at once; its error shows late all the same."""
        self.compiling: CompileProgress | None = None
        self.gate: threading.Semaphore | None = None
        """If set, every step waits for a permit."""
        self.resets = -1
        self.reset()

    def reset(self) -> None:
        self.resets += 1
        self.is_broken = False
        """True from a step that fails until `reset`."""
        shape = (self.dp, self.pages_per_group * self.page_size)
        self._last_tokens = np.full((self.dp, self.max_running), STALE)
        self.slots, self._following = np.full(shape, NOTHING), np.full(shape, NOTHING)

    def check(self, request: StepRequest) -> None:
        if self.refused in request.tokens:
            raise ValueError("a token that is refused")

    def dispatch(self, groups: Sequence[Sequence[StepRequest]]) -> PendingStep:
        for request in (request for requests in groups for request in requests):
            self.check(request)
        copies = [[_copy(request) for request in requests] for requests in groups]
        step = PendingStep(lambda: self.step(copies))
        if not self.runs_late:
            step.run()
        return step

    def step(self, groups: Sequence[Sequence[StepRequest]]) -> RunnerOutput:
        if self.gate:
            self.gate.acquire()
        for request in (request for requests in groups for request in requests):
            self.check(request)
        if self.fail_next:  # after dispatch: the donated cache is gone
            self.fail_next -= 1
            self.is_broken = True
            self.slots[:] = self._following[:] = self._last_tokens[:] = STALE
            raise RuntimeError("a device fell over")
        for requests in groups:
            self._check(requests)
        self.steps += 1
        return self.output(groups, [[self._run(g, r) for r in requests] for g, requests in enumerate(groups)])

    def output(self, groups: Sequence[Sequence[StepRequest]], results: list[list[StepResult]]) -> RunnerOutput:
        """Adds the ranks' loads to the results."""
        group_loads = [
            loads([len(r.tokens) for r in group], [r.num_computed_tokens for r in group], cp=self.cp)
            for group in groups
        ]
        rank_tokens, rank_pairs = np.sum(group_loads, axis=0)
        return RunnerOutput(results, rank_tokens, rank_pairs)

    def slots_of(self, pages: Sequence[int], tokens: int) -> np.ndarray:
        at = np.arange(tokens)
        return np.asarray(pages)[at // self.page_size] * self.page_size + at % self.page_size

    def _check(self, requests: Sequence[StepRequest]) -> None:
        assert len(requests) <= self.max_running
        assert sum(len(r.tokens) for r in requests if len(r.tokens) - r.drafts > 1) <= self.prefill_chunk
        assert all(r.drafts <= self.draft_tokens for r in requests)
        assert not any(r.drafts and r.logit_bias for r in requests)
        for r in requests:
            written = set(r.pages[r.num_computed_tokens // self.page_size :])
            others = {page for other in requests if other is not r for page in other.pages}
            assert not written & others, "a page is written that another request refers to"
            assert len(set(r.pages)) == len(r.pages)

    def _run(self, group: int, request: StepRequest) -> StepResult:
        request = dataclasses.replace(
            request, tokens=[self._last_tokens[group][-1 - t] if t < 0 else t for t in request.tokens]
        )
        assert min(request.tokens) >= 0, "a slot without a token"
        end, size = request.num_computed_tokens + len(request.tokens), self.page_size
        slots = self.slots_of(request.pages, end)
        memory, following = self.slots[group], self._following[group]
        seen = [*memory[slots[: request.num_computed_tokens]].tolist(), *map(int, request.tokens)]
        if self.draft_tokens:
            known = seen[1 : len(seen) - request.drafts]
            assert following[slots[: request.num_computed_tokens]].tolist() == known[: request.num_computed_tokens], (
                "an MTP latent is of another text"
            )
        # Pages that are begun and not filled are zeroed. Drafts beyond those verified leave latents behind.
        reach = end if request.sampling is None else min(end + max(self.draft_tokens - 1, 0), len(request.pages) * size)
        for page in request.pages[max(end // size, -(-request.num_computed_tokens // size)) : -(-reach // size)]:
            memory[page * size : (page + 1) * size] = following[page * size : (page + 1) * size] = NOTHING
        memory[slots[request.num_computed_tokens :]] = request.tokens
        memory[self.slots_of(request.pages, reach)[end:]] = STALE
        scored = self._score(seen, request) if request.prompt_logprobs else None
        if request.sampling is None:
            after = [
                *seen[request.num_computed_tokens + 1 :],
                NOTHING if request.next_token is None else request.next_token,
            ]
            following[slots[request.num_computed_tokens :]] = after
            return StepResult([], [], scored)
        seen, drafts = seen[: end - request.drafts], seen[end - request.drafts :]
        start = len(seen)
        while True:
            seen.append(allowed(next_token(seen), request.logit_bias))
            if not drafts or seen[-1] != drafts.pop(0):
                break
        self.keep(group, request, seen[-1])
        following[slots[request.num_computed_tokens :]] = NOTHING
        following[slots[request.num_computed_tokens : len(seen) - 1]] = seen[request.num_computed_tokens + 1 :]
        self.accepted[request.drafts, len(seen) - start - 1] += 1
        drawn = [SampledToken(token, -0.5, np.arange(20), np.linspace(-1, -9, 20)) for token in seen[start:]]
        return StepResult(drawn, guesses(seen, self.draft_tokens), scored)

    def keep(self, group: int, request: StepRequest, token: int) -> None:
        """Keeps a sampled token in the request's slot."""
        if request.slot is not None:
            self._last_tokens[group][request.slot] = token

    def _score(self, seen: Sequence[int], request: StepRequest) -> TokenLogprobs:
        after = [
            *seen[request.num_computed_tokens + 1 :],
            *([] if request.next_token is None else [request.next_token]),
        ]
        values = np.full(len(request.tokens), np.nan, np.float32)
        for n, token in enumerate(after):
            values[n] = logprob(seen[: request.num_computed_tokens + n + 1], token)
        top = np.tile(np.arange(20, dtype=np.int32), (len(request.tokens), 1))
        return TokenLogprobs(values, top, np.tile(values[:, None], (1, 20)))
