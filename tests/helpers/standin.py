"""A stand-in for the model that remembers only what is in its pages: wrong pages or positions give wrong tokens."""

from __future__ import annotations

import collections
import threading
from collections.abc import Sequence

import numpy as np

from jax_mla_cp.batch.logit_bias import LogitBias
from jax_mla_cp.batch.step_request import StepRequest
from jax_mla_cp.step.compile_progress import CompileProgress
from jax_mla_cp.step.results import SampledToken, StepResult, TokenLogprobs

VOCAB = 251


def next_token(tokens: Sequence[int]) -> int:
    """A function of all tokens and their places."""
    value = 7
    for token in tokens:
        value = (value * 31 + token + 1) % 1_000_003
    return value % VOCAB


def continuation(prompt: Sequence[int], count: int, stop: frozenset[int] = frozenset()) -> list[int]:
    """What a request must get."""
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(next_token(tokens))
        if tokens[-1] in stop:
            break
    return tokens[len(prompt) :]


def guesses(tokens: Sequence[int], count: int) -> list[int]:
    """Drafts for what follows, of which every third or so is wrong."""
    seen = list(tokens)
    for _ in range(count):
        true = next_token(seen)
        seen.append(true if (true + len(seen)) % 3 else (true + 1) % VOCAB)
    return seen[len(tokens) :]


def allowed(token: int, adjust: LogitBias | None) -> int:
    """The token, or if it may not be, the next one that may."""
    if adjust is None:
        return token
    never = set(adjust.tokens[adjust.add == -np.inf].tolist())
    candidates = ((token + n) % VOCAB for n in range(VOCAB))
    mask = np.full(-(-VOCAB // 32), 0xFFFFFFFF, np.uint32) if adjust.mask is None else adjust.mask
    return next(t for t in candidates if t not in never and int(mask[t // 32]) >> t % 32 & 1)


def logprob(before: Sequence[int], token: int) -> float:
    """Of a token after others."""
    return -((token - next_token(before)) % VOCAB) / 8


NOTHING, STALE = -1, -2


class PageModel:
    """Keeps tokens in pages as the real model keeps latents, and checks the engine's side of the contract.

    With drafts, a slot remembers the token after its own too, as the MTP layer's latent does; and what a step writes behind
    the last token, or leaves of a page that it begins, is as wrong as the real one's.
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
        self.held: collections.Counter[tuple[int, int]] = collections.Counter()
        """How often so many drafts were given, and so many of them held."""
        self.fail_next = 0
        self.refused: int | None = None
        """A token: works that have it can't be run."""
        self.steps = 0
        """Those that succeeded."""
        self.prefilled = 0
        """Tokens of works with more than one."""
        self.gate: threading.Semaphore | None = None
        """Set: every step waits for a permit."""
        self.compiling: CompileProgress | None = None
        self.reset()

    def reset(self) -> None:
        shape = (self.dp, self.pages_per_group * self.page_size)
        self.slots, self._following = np.full(shape, NOTHING), np.full(shape, NOTHING)

    def check(self, work: StepRequest) -> None:
        if self.refused in work.tokens:
            raise ValueError("a token that is refused")

    def step(self, work: Sequence[Sequence[StepRequest]]) -> list[list[StepResult]]:
        if self.gate:
            self.gate.acquire()
        for each in (w for works in work for w in works):
            self.check(each)
        if self.fail_next:  # after dispatch: the donated cache is gone
            self.fail_next -= 1
            self.slots[:] = self._following[:] = STALE
            raise RuntimeError("a device fell over")
        for works in work:
            self._check(works)
        self.steps += 1
        return [[self._run(g, w) for w in works] for g, works in enumerate(work)]

    def slots_of(self, pages: Sequence[int], tokens: int) -> np.ndarray:
        at = np.arange(tokens)
        return np.asarray(pages)[at // self.page_size] * self.page_size + at % self.page_size

    def _check(self, works: Sequence[StepRequest]) -> None:
        assert len(works) <= self.max_running
        assert sum(len(w.tokens) for w in works if len(w.tokens) - w.drafts > 1) <= self.prefill_chunk
        assert all(w.drafts <= self.draft_tokens for w in works)
        assert not any(w.drafts and w.logit_bias for w in works)
        for w in works:
            written = set(w.pages[w.num_computed_tokens // self.page_size :])
            others = {page for other in works if other is not w for page in other.pages}
            assert not written & others, "a page is written that another request refers to"
            assert len(set(w.pages)) == len(w.pages)

    def _run(self, group: int, work: StepRequest) -> StepResult:
        end, size = work.num_computed_tokens + len(work.tokens), self.page_size
        self.prefilled += len(work.tokens) if len(work.tokens) - work.drafts > 1 else 0
        slots = self.slots_of(work.pages, end)
        memory, following = self.slots[group], self._following[group]
        seen = [*memory[slots[: work.num_computed_tokens]].tolist(), *map(int, work.tokens)]
        if self.draft_tokens:
            known = seen[1 : len(seen) - work.drafts]
            assert following[slots[: work.num_computed_tokens]].tolist() == known[: work.num_computed_tokens], "an MTP latent is of another text"
        # What is begun and not filled is zeroed; guesses beyond the drafts leave latents behind.
        reach = end if work.sampling is None else min(end + max(self.draft_tokens - 1, 0), len(work.pages) * size)
        for page in work.pages[max(end // size, -(-work.num_computed_tokens // size)) : -(-reach // size)]:
            memory[page * size : (page + 1) * size] = following[page * size : (page + 1) * size] = NOTHING
        memory[slots[work.num_computed_tokens :]] = work.tokens
        memory[self.slots_of(work.pages, reach)[end:]] = STALE
        scored = self._score(seen, work) if work.score else None
        if work.sampling is None:
            after = [*seen[work.num_computed_tokens + 1 :], NOTHING if work.next_token is None else work.next_token]
            following[slots[work.num_computed_tokens :]] = after
            return StepResult([], [], scored)
        seen, drafts = seen[: end - work.drafts], seen[end - work.drafts :]
        start = len(seen)
        while True:
            seen.append(allowed(next_token(seen), work.logit_bias))
            if not drafts or seen[-1] != drafts.pop(0):
                break
        following[slots[work.num_computed_tokens :]] = NOTHING
        following[slots[work.num_computed_tokens : len(seen) - 1]] = seen[work.num_computed_tokens + 1 :]
        self.held[work.drafts, len(seen) - start - 1] += 1
        drawn = [SampledToken(token, -0.5, np.arange(20), np.linspace(-1, -9, 20)) for token in seen[start:]]
        return StepResult(drawn, guesses(seen, self.draft_tokens), scored)

    def _score(self, seen: Sequence[int], work: StepRequest) -> TokenLogprobs:
        after = [*seen[work.num_computed_tokens + 1 :], *([] if work.next_token is None else [work.next_token])]
        values = np.full(len(work.tokens), np.nan, np.float32)
        for n, token in enumerate(after):
            values[n] = logprob(seen[: work.num_computed_tokens + n + 1], token)
        top = np.tile(np.arange(20, dtype=np.int32), (len(work.tokens), 1))
        return TokenLogprobs(values, top, np.tile(values[:, None], (1, 20)))
