"""Which tokens of which requests run in the next step.

Every decoding request takes part in every step of its dp group; what is left of the step, up to `prefill_chunk` tokens,
goes to prompts in the order of their arrival, so that a long prompt is prefilled in pieces between decode steps. A request
is admitted when its dp group has pages for all of it, prompt and continuation: an admitted request never has to wait.
Drafts need no pages of their own: there are never more than would fit if all of them held.
"""

from __future__ import annotations

import dataclasses
from collections import deque

from jax_mla_cp.batch import Work
from jax_mla_cp.engine.pages import Pages
from jax_mla_cp.engine.request import Request


@dataclasses.dataclass(frozen=True)
class Scheduled:
    """A request's part of a step: its next `count` tokens, and its drafts if they are the last ones."""

    request: Request
    count: int

    def work(self) -> Work:
        r = self.request
        end = r.computed + self.count
        tokens = r.tokens[r.computed : end]
        if end < len(r.tokens):
            return Work(tokens, r.computed, r.pages, next_token=r.tokens[end])
        return Work(tokens + r.drafts, r.computed, r.pages, r.sampling, drafts=len(r.drafts))


class Scheduler:
    """Waiting and running requests. Not thread-safe: the engine's thread owns it."""

    def __init__(self, *, groups: int, pages_per_group: int, page_size: int, max_running: int, prefill_chunk: int):
        self.pages = [Pages(pages_per_group, page_size) for _ in range(groups)]
        self.waiting: deque[Request] = deque()
        self.running: list[list[Request]] = [[] for _ in range(groups)]
        self._max_running = max_running
        self._prefill_chunk = prefill_chunk

    @property
    def busy(self) -> bool:
        return bool(self.waiting) or any(self.running)

    def add(self, request: Request) -> None:
        self.waiting.append(request)

    def schedule(self) -> list[list[Scheduled]]:
        """Admits what fits, and chooses the next step's tokens, per dp group."""
        while self.waiting and self._admit(self.waiting[0]):
            self.waiting.popleft()
        return [self._group(running) for running in self.running]

    def advance(self, scheduled: Scheduled, held: int = 0) -> None:
        """The step with these tokens is done, and the first `held` of their drafts are tokens now."""
        scheduled.request.computed += scheduled.count + held

    def remove(self, request: Request) -> None:
        """Forgets a request, finished or aborted, and frees its pages. Unknown requests are ignored."""
        if request in self.waiting:
            self.waiting.remove(request)
        elif request.group >= 0 and request in self.running[request.group]:
            self.running[request.group].remove(request)
            self.pages[request.group].release(request.pages)
            request.pages, request.group = [], -1

    def _admit(self, request: Request) -> bool:
        group = max(
            range(len(self.pages)), key=lambda g: (len(self.running[g]) < self._max_running, self.pages[g].free)
        )
        needed = self.pages[group].needed(request.reserved)
        if len(self.running[group]) >= self._max_running or not self.pages[group].can_allocate(needed):
            return False
        request.pages, request.group = self.pages[group].allocate(needed), group
        self.running[group].append(request)
        return True

    def _group(self, running: list[Request]) -> list[Scheduled]:
        step, budget = [], self._prefill_chunk
        for request in running:  # in the order of their arrival
            if request.computed >= len(request.prompt):
                step.append(Scheduled(request, 1))
            elif budget:
                count = min(len(request.prompt) - request.computed, budget)
                budget -= count
                step.append(Scheduled(request, count))
        return step
