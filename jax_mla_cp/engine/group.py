"""One dp group: its pages, its running requests, and what of them is in the next step."""

from __future__ import annotations

import dataclasses
from array import array

from jax_mla_cp.batch.step_request import StepRequest
from jax_mla_cp.engine.line import Line
from jax_mla_cp.engine.pages import Pages
from jax_mla_cp.engine.prefix import Names
from jax_mla_cp.engine.request import Request


@dataclasses.dataclass
class Scheduled:
    """A request's part of a step: its next `count` tokens, and its drafts if they are the last ones."""

    request: Request
    count: int

    @property
    def samples(self) -> bool:
        """Whether a token is sampled after them."""
        r = self.request
        return self.count == r.pending and r.left > 0

    def work(self) -> StepRequest:
        r = self.request
        end = r.computed + self.count
        tokens = r.tokens[r.computed : end]
        if not self.samples:
            following = r.tokens[end] if end < len(r.tokens) else None
            return StepRequest(tokens, r.computed, r.pages, next_token=following, score=r.scoring)
        return StepRequest(
            tokens + r.drafts,
            r.computed,
            r.pages,
            r.sampling,
            drafts=len(r.drafts),
            logit_bias=r.logit_bias(),
            score=r.scoring,
        )


@dataclasses.dataclass(frozen=True)
class Offer:
    """What a group can do for a waiting request now."""

    shared: list[int]
    """Pages that hold its first tokens."""
    count: int
    """Tokens that it would compute."""
    soon: bool
    """A running request is computing the next page of it: waiting costs less than computing it twice."""


class Group:
    """Not thread-safe: the engine's thread owns it.

    A step takes at most `prefill_chunk` tokens of prompts; decoding requests are in every step besides.
    """

    def __init__(
        self, *, pages: int, page_size: int, max_running: int, prefill_chunk: int, draft_tokens: int, names: Names
    ):
        self.pages = Pages(pages, page_size)
        self.running = Line()
        self.step: list[Scheduled] = []
        self._max_running = max_running
        self._chunk = prefill_chunk
        self._draft_tokens = draft_tokens
        self._names = names
        self._budget = 0
        self._reserve = 0
        self._soon: set[bytes] = set()

    @property
    def places(self) -> int:
        """Requests that may start."""
        return self._max_running - len(self.running)

    def proceed(self) -> list[Request]:
        """Begins a step with the running requests, oldest first, and gives each the pages that it needs for it.

        Returns:
          The requests that had to give up theirs, the youngest of all; they run no longer.
        """
        self.step, self._budget, preempted = [], self._chunk, []
        for request in self.running:
            if request.group is None:
                break  # given up for an older one, like all that follow
            wanted = 1 if request.decoding else min(request.pending, self._budget)
            while wanted and not (count := self._grow(request, wanted)):
                victim = self.running.last
                self._preempt(victim)
                preempted.append(victim)
                if victim is request:
                    break
            if wanted and request.group is not None:
                self._schedule(request, count)
        # What is kept for the running requests when others want to start: the rest of their tokens, and a page more each.
        self._reserve = sum(map(self._outstanding, self.running))
        self._soon = set()
        for request in self.running:
            self._announce(request)
        return preempted

    def offer(self, request: Request) -> Offer | None:
        """None: there is no room for its next tokens now.

        A request that has been preempted waits for room for all its tokens, or it could be preempted again and again.
        """
        if not (self.places and self._budget):
            return None
        shared, soon = self._find(request)
        start = len(shared) * self.pages.page_size
        count = min(len(request.tokens) - start, self._budget)
        end = len(request.tokens) if request.preempted else start + count
        needed = self.pages.needed(end) - len(shared) + self.pages.unused(shared)
        return Offer(shared, count, soon) if needed <= self.pages.available - self._reserve else None

    def start(self, request: Request, offer: Offer) -> None:
        """Takes an offer that has just been made."""
        self.pages.share(offer.shared)
        request.pages = array("i", offer.shared)
        request.named = len(offer.shared)
        request.computed = request.named * self.pages.page_size
        self.running.add(request)
        self._schedule(request, self._grow(request, offer.count))
        self._reserve += self._outstanding(request)
        self._announce(request)

    def end_step(self) -> None:
        """Drafts come last: they take what pages nobody else is going to need next, or are fewer."""
        for scheduled in self.step:
            request = scheduled.request
            if not (self._draft_tokens and scheduled.samples):
                continue
            end = request.computed + scheduled.count
            # The step also writes the latents of guesses at what follows the drafts.
            wanted = min(end + len(request.drafts) + self._draft_tokens - 1, request.longest)
            missing = self.pages.needed(wanted) - len(request.pages)
            spare = max(self.pages.available - len(self.running), 0)
            request.pages.extend(self.pages.allocate(max(min(missing, spare), 0)))
            del request.drafts[len(request.pages) * self.pages.page_size - end :]

    def name(self, request: Request) -> None:
        """Lets others use the pages that are complete."""
        complete = min(request.computed // self.pages.page_size, self._names.known(len(request.tokens)))
        for n in range(request.named, complete):
            name = self._names.of(request, n)
            assert name is not None
            request.pages[n] = self.pages.register(name, request.pages[n])
        request.named = max(request.named, complete)

    def remove(self, request: Request) -> None:
        """Takes a running request out; what it has named stays cached."""
        self.running.remove(request)
        self.pages.release(request.pages)
        request.pages, request.group = array("i"), None
        request.computed, request.named, request.drafts, request.scores = 0, 0, [], []

    def _schedule(self, request: Request, count: int) -> None:
        if not request.decoding:
            self._budget -= count
        self.step.append(Scheduled(request, count))

    def _grow(self, request: Request, count: int) -> int:
        """Pages for up to `count` more tokens.

        Returns:
          For how many of them there is room now.
        """
        missing = self.pages.needed(request.computed + count) - len(request.pages)
        request.pages.extend(self.pages.allocate(max(min(missing, self.pages.available), 0)))
        return min(count, len(request.pages) * self.pages.page_size - request.computed)

    def _preempt(self, request: Request) -> None:
        self.remove(request)
        request.preempted = True

    def _outstanding(self, request: Request) -> int:
        """Pages that it lacks for its tokens, and one for what it samples."""
        return max(self.pages.needed(len(request.tokens)) - len(request.pages), 0) + 1

    def _announce(self, request: Request) -> None:
        """The page that a request computes now."""
        if not request.decoding and (name := self._names.of(request, request.named)) is not None:
            self._soon.add(name)

    def _find(self, request: Request) -> tuple[list[int], bool]:
        """Pages with its first tokens, and whether the one after them is being computed. Its last token has to run."""
        found: list[int] = []
        if request.scoring:
            return found, False
        for n in range((len(request.tokens) - 1) // self.pages.page_size):
            name = self._names.of(request, n)
            assert name is not None
            page = self.pages.find(name)
            if page is None:
                return found, name in self._soon
            found.append(page)
        return found, False
