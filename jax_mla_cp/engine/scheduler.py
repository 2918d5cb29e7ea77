"""Which tokens of which requests run in the next step. docs/engine.md tells the rules and why they end."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator

from jax_mla_cp.engine.group import Group, Offer, Scheduled
from jax_mla_cp.engine.line import Line
from jax_mla_cp.engine.prefix import Names
from jax_mla_cp.engine.request import Request


@dataclasses.dataclass
class Counts:
    """Since the start."""

    prefix_queries: int = 0
    """Tokens of requests that started and might have found pages with them."""
    prefix_hits: int = 0
    """Those that did."""
    preemptions: int = 0


class Scheduler:
    """Waiting and running requests. Not thread-safe: the engine's thread owns it."""

    def __init__(
        self,
        *,
        groups: int,
        pages_per_group: int,
        page_size: int,
        max_running: int,
        prefill_chunk: int,
        draft_tokens: int = 0,
    ):
        names = Names(page_size, covers_next=draft_tokens > 0)
        self.groups = [
            Group(
                pages=pages_per_group,
                page_size=page_size,
                max_running=max_running,
                prefill_chunk=prefill_chunk,
                draft_tokens=draft_tokens,
                names=names,
            )
            for _ in range(groups)
        ]
        self.waiting = Line()
        self.counts = Counts()
        self._arrivals = itertools.count()

    @property
    def busy(self) -> bool:
        return bool(self.waiting) or any(group.running for group in self.groups)

    @property
    def requests(self) -> Iterator[Request]:
        """All, running ones first."""
        return itertools.chain(*(group.running for group in self.groups), self.waiting)

    def add(self, request: Request) -> None:
        request.arrival = next(self._arrivals)
        self.waiting.add(request)

    def schedule(self) -> list[list[Scheduled]]:
        """The next step, per dp group."""
        for group in self.groups:
            for request in group.proceed():
                self.waiting.add(request)
                self.counts.preemptions += 1
        self._start_waiting()
        for group in self.groups:
            group.end_step()
        return [group.step for group in self.groups]

    def taken(self, request: Request) -> None:
        """The request's part of a step is done, and its state tells what came of it."""
        assert request.group is not None
        self.groups[request.group].name(request)

    def remove(self, request: Request) -> bool:
        """Forgets a request, finished or aborted, and frees its pages. Returns whether it was there."""
        if request.group is None:
            return self.waiting.remove(request)
        self.groups[request.group].remove(request)
        return True

    def restart(self) -> None:
        """The cache is lost: all running requests wait for their turn to be computed again, and nothing is reused."""
        for group in self.groups:
            for request in group.running:
                group.remove(request)
                self.waiting.add(request)
            group.pages.forget()

    def _start_waiting(self) -> None:
        """In the order of arrival. What finds no room keeps those behind it waiting too, or long ones would starve."""
        for request in self.waiting.first(sum(group.places for group in self.groups)):
            offers = [(offer, g) for g, group in enumerate(self.groups) if (offer := group.offer(request))]
            if not offers:
                return
            offer, g = max(offers, key=lambda choice: (len(choice[0].shared), self.groups[choice[1]].pages.available))
            if not offer.soon:
                self._start(request, offer, g)

    def _start(self, request: Request, offer: Offer, g: int) -> None:
        self.waiting.remove(request)
        request.group = g
        self.groups[g].start(request, offer)
        if request.started is None:
            request.cached_tokens = request.computed
            if not request.scoring:
                self.counts.prefix_queries += len(request.prompt)
                self.counts.prefix_hits += request.computed
