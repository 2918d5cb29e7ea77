"""What a step made of its works: from arrays, one for all, to one `Outcome` per work."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from jax_mla_cp.batch.arrays import Batch
from jax_mla_cp.batch.layout import Layout
from jax_mla_cp.batch.shapes import BatchShape
from jax_mla_cp.batch.work import Work
from jax_mla_cp.step.sampling import SampledArrays, ScoredArrays


@dataclasses.dataclass(frozen=True)
class Sampled:
    """A sampled token, its log-probability, and the 20 most likely tokens with theirs: the model's own, whatever is adjusted."""

    token: int
    logprob: float
    top_tokens: np.ndarray
    top_logprobs: np.ndarray


@dataclasses.dataclass(frozen=True)
class Scored:
    """For each of a work's tokens, of the token after it: what the model thinks, whatever is adjusted or sampled.

    NaN where the token after it is not known: behind the last one, if the work has no `next_token`, and before drafts.
    The log-probability of a token that is in the list is the list's float.
    """

    logprobs: NDArray[np.float32]
    """[len(work.tokens)]"""
    top_tokens: NDArray[np.int32]
    """[len(work.tokens), 20]: the most likely ones. (Fewer, if the vocabulary is smaller.)"""
    top_logprobs: NDArray[np.float32]
    """[len(work.tokens), 20]"""


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What a step made of one work."""

    sampled: list[Sampled]
    """Nothing, if the work samples nothing; else the drafts that hold and the token after them."""
    drafts: list[int]
    """Guesses at the tokens that follow, for the request's next step."""
    scored: Scored | None = None
    """Of works with `score`."""


def outcomes(
    arrays: SampledArrays, groups: Sequence[Sequence[Work]], layouts: Sequence[Layout], batch: Batch, shape: BatchShape
) -> list[list[Outcome]]:
    """One per work, of a step's results as NumPy arrays.

    Args:
      layouts, batch: those that the step was made of.
    """
    tokens, logprobs = arrays.token.tolist(), arrays.logprob.tolist()
    tops = list(arrays.top_tokens), list(arrays.top_logprobs)
    drafts = None if arrays.drafts is None else arrays.drafts.tolist()

    def one(place: int, work: Work, scored: Scored | None) -> Outcome:
        if work.sampling is None:
            return Outcome([], [], scored)
        first, held = place * shape.samples, 0
        if work.drafts:
            guesses = work.tokens[len(work.tokens) - work.drafts :]
            held = next((n for n, guess in enumerate(guesses) if guess != tokens[first + n]), work.drafts)
        drawn = [
            Sampled(tokens[row], logprobs[row], tops[0][row], tops[1][row]) for row in range(first, first + held + 1)
        ]
        return Outcome(drawn, [] if drafts is None else drafts[place], scored)

    results = []
    for group, works in enumerate(groups):
        scored: Sequence[Scored | None] = [None] * len(works)
        if arrays.scored is not None:
            scored = list(_scored(arrays.scored, group, layouts[group], batch))
        results.append([one(group * shape.requests + i, work, scored[i]) for i, work in enumerate(works)])
    return results


def _scored(arrays: ScoredArrays, group: int, layout: Layout, batch: Batch) -> Iterator[Scored | None]:
    """From the ranks' buffers to the order of each work's tokens."""
    tokens = len(batch.tokens) // len(batch.num_tokens)
    place, token = layout.places(tokens)
    where = np.empty_like(place)
    where[token] = place + group * layout.plan.cp * tokens
    logprobs = np.where(batch.next_tokens[where] < 0, np.float32(np.nan), arrays.logprob[where])
    top_tokens, top_logprobs = arrays.top_tokens[where], arrays.top_logprobs[where]
    start = layout.works.start.tolist()
    for work, first, end in zip(layout.works.works, start, start[1:], strict=False):
        mine = slice(first, end)
        yield Scored(logprobs[mine], top_tokens[mine], top_logprobs[mine]) if work.score else None
