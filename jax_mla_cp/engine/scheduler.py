"""Chooses the tokens of each step: continuous batching, chunked prefill, preemption. docs/engine.md has the rules."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator

from jax_mla_cp.engine.group_scheduler import Admission, GroupScheduler
from jax_mla_cp.engine.prefix_hash import PrefixHasher
from jax_mla_cp.engine.request import Request
from jax_mla_cp.engine.request_queue import RequestQueue
from jax_mla_cp.engine.scheduled_request import ScheduledRequest


@dataclasses.dataclass
class SchedulerStats:
    """Counts since the start."""

    prefix_queries: int = 0
    """Prompt tokens looked up in the prefix cache."""
    prefix_hits: int = 0
    """Prompt tokens found in the prefix cache."""
    preemptions: int = 0


class Scheduler:
    """The waiting queue, and a scheduler per dp group for the running requests.

    Not thread-safe: the engine's thread owns it.
    """

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
        hasher = PrefixHasher(page_size, covers_next=draft_tokens > 0)
        self.groups = [
            GroupScheduler(
                num_pages=pages_per_group,
                page_size=page_size,
                max_running=max_running,
                prefill_chunk=prefill_chunk,
                draft_tokens=draft_tokens,
                hasher=hasher,
            )
            for _ in range(groups)
        ]
        self.waiting = RequestQueue()
        self.stats = SchedulerStats()
        self._arrivals = itertools.count()

    @property
    def has_requests(self) -> bool:
        return bool(self.waiting) or any(group.running for group in self.groups)

    @property
    def requests(self) -> Iterator[Request]:
        """All requests, running ones first."""
        return itertools.chain(*(group.running for group in self.groups), self.waiting)

    def add(self, request: Request) -> None:
        """Appends a new request to the waiting queue."""
        request.arrival_index = next(self._arrivals)
        self.waiting.add(request)

    def schedule(self) -> list[list[ScheduledRequest]]:
        """Schedules the next step: per dp group, its requests and their tokens."""
        for group in self.groups:
            for request in group.schedule_running():
                self.waiting.add(request)
                self.stats.preemptions += 1
        self._admit_waiting()
        for group in self.groups:
            group.allocate_drafts()
        return [group.scheduled for group in self.groups]

    def commit_pages(self, request: Request) -> None:
        """Commits the pages that a request's last step completed. Call it after the step's output is processed. Does nothing for a
        request that has been preempted since the step was dispatched."""
        if request.group is not None:
            self.groups[request.group].commit_pages(request)

    def remove(self, request: Request) -> bool:
        """Removes a finished or aborted request and releases its pages. Returns False if it isn't here."""
        if request.group is None:
            return self.waiting.remove(request)
        self.groups[request.group].remove(request)
        return True

    def reset_cache(self) -> None:
        """Handles the loss of the KV cache: all running requests return to the waiting queue, and no page is reused."""
        for group in self.groups:
            for request in group.running:
                group.remove(request)
                self.waiting.add(request)
            group.page_pool.reset_prefix_cache()

    def _admit_waiting(self) -> None:
        """Admits requests in the order of arrival.

        A request that doesn't fit blocks those behind it. Long requests would starve otherwise.
        """
        for request in self.waiting.peek(sum(group.num_admissible for group in self.groups)):
            admissions = [
                (admission, g) for g, group in enumerate(self.groups) if (admission := group.check_admission(request))
            ]
            if not admissions:
                return
            # The group with the longest cached prefix; of several, that with the most available pages.
            admission, g = max(
                admissions,
                key=lambda choice: (len(choice[0].prefix_pages), self.groups[choice[1]].page_pool.num_available),
            )
            if not admission.next_page_in_progress:
                self._admit(request, admission, g)

    def _admit(self, request: Request, admission: Admission, g: int) -> None:
        self.waiting.remove(request)
        request.group = g
        self.groups[g].admit(request, admission)
        if request.start_time is None:
            request.cached_tokens = request.num_computed_tokens
            if not request.needs_prompt_logprobs:
                self.stats.prefix_queries += len(request.prompt)
                self.stats.prefix_hits += request.num_computed_tokens
