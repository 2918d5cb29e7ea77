"""A stand-in for the model that remembers only what is in its pages: wrong pages or positions give wrong tokens."""

from __future__ import annotations

import collections
import threading
from collections.abc import Sequence

import numpy as np

from jax_mla_cp.batch import Work
from jax_mla_cp.runner import Outcome, Sampled

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


class PageModel:
    """Keeps tokens in pages as the real model keeps latents, and checks the engine's side of the contract."""

    def __init__(
        self, *, dp: int = 1, pages: int = 40, page_size: int = 4, max_running: int = 4, prefill_chunk: int = 16,
        draft_tokens: int = 0,
    ):  # fmt: skip
        self.dp, self.pages_per_group, self.page_size = dp, pages, page_size
        self.max_running, self.prefill_chunk = max_running, prefill_chunk
        self.draft_tokens = draft_tokens
        self.held: collections.Counter[tuple[int, int]] = collections.Counter()
        """How often so many drafts were given, and so many of them held."""
        self._promised: dict[tuple[int, int], tuple[int, int | None]] = {}
        self.fail_next = 0
        self.steps = 0
        self.gate: threading.Semaphore | None = None
        """Set: every step waits for a permit."""
        self.reset()

    def reset(self) -> None:
        self._slots = np.full((self.dp, self.pages_per_group * self.page_size), -1)

    def step(self, work: Sequence[Sequence[Work]]) -> list[list[Outcome]]:
        if self.gate:
            self.gate.acquire()
        self.steps += 1
        if self.fail_next:
            self.fail_next -= 1
            raise RuntimeError("a device fell over")
        return [[self._run(g, w) for w in self._checked(works)] for g, works in enumerate(work)]

    def _checked(self, works: Sequence[Work]) -> Sequence[Work]:
        assert len(works) <= self.max_running
        assert sum(len(w.tokens) for w in works if len(w.tokens) - w.drafts > 1) <= self.prefill_chunk
        pages = [page for w in works for page in w.pages]
        assert len(pages) == len(set(pages)), "two requests share a page"
        assert all(w.drafts <= self.draft_tokens for w in works)
        return works

    def _run(self, group: int, work: Work) -> Outcome:
        end = work.cached + len(work.tokens)
        at = np.arange(end)
        slots = np.asarray(work.pages)[at // self.page_size] * self.page_size + at % self.page_size
        self._slots[group, slots[work.cached :]] = work.tokens
        place, promised = self._promised.pop((group, work.pages[0]), (0, None))
        assert place != work.cached or promised in (None, work.tokens[0]), "next_token was another one"
        if work.sampling is None:
            assert work.next_token is not None
            self._promised[group, work.pages[0]] = end, work.next_token
            return Outcome([], [])
        seen = self._slots[group, slots].tolist()
        seen, drafts = seen[: end - work.drafts], seen[end - work.drafts :]
        start = len(seen)
        while True:
            seen.append(next_token(seen))
            if not drafts or seen[-1] != drafts.pop(0):
                break
        self.held[work.drafts, len(seen) - start - 1] += 1
        drawn = [Sampled(token, -0.5, np.arange(20), np.linspace(-1, -9, 20)) for token in seen[start:]]
        return Outcome(drawn, guesses(seen, self.draft_tokens))
