"""One dp group's scheduler: its page pool, its running requests, and the tokens of its next step."""

from __future__ import annotations

import dataclasses
from array import array

from jax_mla_cp.engine.page_pool import PagePool
from jax_mla_cp.engine.prefix_hash import PrefixHasher
from jax_mla_cp.engine.request import Request
from jax_mla_cp.engine.request_queue import RequestQueue
from jax_mla_cp.engine.scheduled_request import ScheduledRequest


@dataclasses.dataclass(frozen=True)
class Admission:
    """The result of an admission check: a group can admit a waiting request now."""

    prefix_pages: list[int]
    """Committed pages with the request's first tokens."""
    num_tokens: int
    """Tokens that it would compute in this step."""
    next_page_in_progress: bool
    """A running request is computing the next page of the prefix: it is cheaper to wait than to compute it twice."""


class GroupScheduler:
    """Schedules one dp group. Not thread-safe: the engine's thread owns it.

    Every step has all decoding requests, and at most `prefill_chunk` prompt tokens beside them. A step is scheduled in three
    phases: `schedule_running`, then `check_admission` and `admit` for waiting requests, then `allocate_drafts`.
    """

    def __init__(
        self,
        *,
        num_pages: int,
        page_size: int,
        max_running: int,
        prefill_chunk: int,
        draft_tokens: int,
        hasher: PrefixHasher,
    ):
        self.page_pool = PagePool(num_pages, page_size)
        self.running = RequestQueue()
        self.scheduled: list[ScheduledRequest] = []
        self._max_running = max_running
        self._prefill_chunk = prefill_chunk
        self._draft_tokens = draft_tokens
        self._hasher = hasher
        self._prefill_budget = 0
        self._reserved_pages = 0
        self._hashes_in_progress: set[bytes] = set()
        self._free_slots = list(reversed(range(max_running)))

    @property
    def num_admissible(self) -> int:
        """Number of requests that may be admitted until `max_running` are running."""
        return self._max_running - len(self.running)

    def schedule_running(self) -> list[Request]:
        """Begins a step with the running requests, oldest first, and allocates the pages that each needs for it.

        Returns:
          The requests preempted for lack of pages, the youngest first.
        """
        self.scheduled, self._prefill_budget, preempted = [], self._prefill_chunk, []
        for request in self.running:
            if request.group is None:
                break  # preempted for an older one, like all that follow
            wanted = 1 if request.is_decoding else min(request.num_uncomputed_tokens, self._prefill_budget)
            if request.num_pending_tokens and not request.num_remaining_tokens:
                wanted = 0  # the last token is in flight
            while wanted and not (num_tokens := self._allocate(request, wanted)):
                victim = self.running.last
                self._preempt(victim)
                preempted.append(victim)
                if victim is request:
                    break
            if wanted and request.group is not None:
                self._schedule(request, num_tokens)
        self._reserved_pages = sum(map(self._pages_to_reserve, self.running))
        self._hashes_in_progress = set()
        for request in self.running:
            self._mark_in_progress(request)
        return preempted

    def check_admission(self, request: Request) -> Admission | None:
        """Checks whether a waiting request can run in this step; None if not.

        A preempted request waits until its tokens are known and there are pages for all of them. It could be preempted again
        and again otherwise.
        """
        if not (self.num_admissible and self._prefill_budget) or request.num_pending_tokens:
            return None
        prefix_pages, in_progress = self._lookup_prefix(request)
        start = len(prefix_pages) * self.page_pool.page_size
        num_tokens = min(len(request.tokens) - start, self._prefill_budget)
        end = len(request.tokens) if request.preempted else start + num_tokens
        num_pages = self.page_pool.pages_for(end) - len(prefix_pages) + self.page_pool.count_cached(prefix_pages)
        if num_pages > self.page_pool.num_available - self._reserved_pages:
            return None
        return Admission(prefix_pages, num_tokens, in_progress)

    def admit(self, request: Request, admission: Admission) -> None:
        """Starts a request. Nothing may have happened to the group since its admission check."""
        self.page_pool.share(admission.prefix_pages)
        request.pages = array("i", admission.prefix_pages)
        request.num_committed_pages = len(admission.prefix_pages)
        request.num_computed_tokens = request.num_committed_pages * self.page_pool.page_size
        request.num_verified_tokens = request.num_computed_tokens
        request.slot = self._free_slots.pop()
        self.running.add(request)
        self._schedule(request, self._allocate(request, admission.num_tokens))
        self._reserved_pages += self._pages_to_reserve(request)
        self._mark_in_progress(request)

    def allocate_drafts(self) -> None:
        """Ends a step: allocates pages for drafts, and drops the drafts that don't fit.

        Drafts come last. They take only pages that no running request needs for its next token.
        """
        for scheduled in self.scheduled:
            request = scheduled.request
            if not (self._draft_tokens and scheduled.needs_sampling):
                continue
            end = request.num_computed_tokens + scheduled.num_tokens
            # The step also writes the latents of the drafts it proposes.
            wanted = min(end + len(request.drafts) + self._draft_tokens - 1, request.max_slots)
            missing = self.page_pool.pages_for(wanted) - len(request.pages)
            spare = max(self.page_pool.num_available - len(self.running), 0)
            request.pages.extend(self.page_pool.allocate(max(min(missing, spare), 0)))
            del request.drafts[len(request.pages) * self.page_pool.page_size - end :]

    def commit_pages(self, request: Request) -> None:
        """Commits the pages that steps which have succeeded completed: other requests may use them."""
        complete = min(
            request.num_verified_tokens // self.page_pool.page_size, self._hasher.num_hashable(request.num_known_tokens)
        )
        for n in range(request.num_committed_pages, complete):
            page_hash = self._hasher.page_hash(request, n)
            assert page_hash is not None
            request.pages[n] = self.page_pool.commit(request.pages[n], page_hash)
        request.num_committed_pages = max(request.num_committed_pages, complete)

    def remove(self, request: Request) -> None:
        """Removes a running request and releases its pages. Committed pages stay cached."""
        # Steps in flight may still write the pages and the slot. Whoever gets them next is in a later step.
        self.running.remove(request)
        self.page_pool.release(request.pages)
        self._free_slots.append(request.slot)
        request.reset_computed()

    def _schedule(self, request: Request, num_tokens: int) -> None:
        if not request.is_decoding:
            self._prefill_budget -= num_tokens
        self.scheduled.append(ScheduledRequest(request, num_tokens))

    def _allocate(self, request: Request, num_tokens: int) -> int:
        """Allocates pages for up to `num_tokens` more tokens. Returns the number of tokens that fit."""
        missing = self.page_pool.pages_for(request.num_computed_tokens + num_tokens) - len(request.pages)
        request.pages.extend(self.page_pool.allocate(max(min(missing, self.page_pool.num_available), 0)))
        return min(num_tokens, len(request.pages) * self.page_pool.page_size - request.num_computed_tokens)

    def _preempt(self, request: Request) -> None:
        self.remove(request)
        request.preempted = True

    def _pages_to_reserve(self, request: Request) -> int:
        """Pages that admission must leave to a running request: those it lacks for its known tokens, and one more."""
        return max(self.page_pool.pages_for(len(request.tokens)) - len(request.pages), 0) + 1

    def _mark_in_progress(self, request: Request) -> None:
        """Notes the hash of the prompt page that a request is computing."""
        if request.is_decoding and request.num_verified_tokens >= len(request.prompt):
            return
        page_hash = self._hasher.page_hash(request, request.num_committed_pages)
        if page_hash is not None:
            self._hashes_in_progress.add(page_hash)

    def _lookup_prefix(self, request: Request) -> tuple[list[int], bool]:
        """Finds the longest committed prefix.

        The last token always runs, so its page is never looked up. Nor is any page of a request that needs prompt
        logprobs: cached pages have no logits.

        Returns:
          The pages, and True if a running request is computing the page that follows them.
        """
        pages: list[int] = []
        if request.needs_prompt_logprobs:
            return pages, False
        for n in range((len(request.tokens) - 1) // self.page_pool.page_size):
            page_hash = self._hasher.page_hash(request, n)
            assert page_hash is not None
            page = self.page_pool.lookup(page_hash)
            if page is None:
                return pages, page_hash in self._hashes_in_progress
            pages.append(page)
        return pages, False
