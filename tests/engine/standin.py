"""A stand-in for the model that remembers only what is in its pages: wrong pages or positions give wrong tokens."""

from __future__ import annotations

import threading
from collections.abc import Sequence

import numpy as np

from jax_mla_cp.batch import Work
from jax_mla_cp.runner import Sampled

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


class PageModel:
    """Keeps tokens in pages as the real model keeps latents, and checks the engine's side of the contract."""

    def __init__(
        self, *, dp: int = 1, pages: int = 40, page_size: int = 4, max_running: int = 4, prefill_chunk: int = 16
    ):
        self.dp, self.pages_per_group, self.page_size = dp, pages, page_size
        self.max_running, self.prefill_chunk = max_running, prefill_chunk
        self.fail_next = 0
        self.steps = 0
        self.gate: threading.Semaphore | None = None
        """Set: every step waits for a permit."""
        self.reset()

    def reset(self) -> None:
        self._slots = np.full((self.dp, self.pages_per_group * self.page_size), -1)

    def step(self, work: Sequence[Sequence[Work]]) -> list[list[Sampled | None]]:
        if self.gate:
            self.gate.acquire()
        self.steps += 1
        if self.fail_next:
            self.fail_next -= 1
            raise RuntimeError("a device fell over")
        return [[self._run(g, w) for w in self._checked(works)] for g, works in enumerate(work)]

    def _checked(self, works: Sequence[Work]) -> Sequence[Work]:
        assert len(works) <= self.max_running
        assert sum(len(w.tokens) for w in works if len(w.tokens) > 1) <= self.prefill_chunk
        pages = [page for w in works for page in w.pages]
        assert len(pages) == len(set(pages)), "two requests share a page"
        return works

    def _run(self, group: int, work: Work) -> Sampled | None:
        end = work.cached + len(work.tokens)
        at = np.arange(end)
        slots = np.asarray(work.pages)[at // self.page_size] * self.page_size + at % self.page_size
        self._slots[group, slots[work.cached :]] = work.tokens
        if work.sampling is None:
            return None
        token = next_token(self._slots[group, slots].tolist())
        return Sampled(token, -0.5, np.arange(20), np.linspace(-1, -9, 20))
