"""What a step made of its works: from arrays, one for all, to one `StepResult` per work."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from jax_mla_cp.batch.arrays import Batch
from jax_mla_cp.batch.layout import Layout
from jax_mla_cp.batch.shapes import BatchShape
from jax_mla_cp.batch.step_request import StepRequest
from jax_mla_cp.step.sampling import SamplerOutput, TokenLogprobsArrays


@dataclasses.dataclass(frozen=True)
class SampledToken:
    """A sampled token, its log-probability, and the 20 most likely tokens with theirs: the model's own, whatever is adjusted."""

    token: int
    logprob: float
    top_tokens: np.ndarray
    top_logprobs: np.ndarray


@dataclasses.dataclass(frozen=True)
class TokenLogprobs:
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
class StepResult:
    """What a step made of one work."""

    sampled: list[SampledToken]
    """Nothing, if the work samples nothing; else the drafts that hold and the token after them."""
    drafts: list[int]
    """Guesses at the tokens that follow, for the request's next step."""
    scored: TokenLogprobs | None = None
    """Of works with `score`."""


@dataclasses.dataclass(frozen=True)
class RunnerOutput:
    """The output of one step: a result per request, and the load of each cp rank, summed over the dp groups."""

    results: list[list[StepResult]]
    """Per dp group, in the order of its requests."""
    rank_tokens: NDArray[np.int64]
    """[cp]: query tokens of each rank."""
    rank_pairs: NDArray[np.int64]
    """[cp]: query-key pairs of each rank, the cost of its attention."""


def read_results(
    arrays: SamplerOutput,
    groups: Sequence[Sequence[StepRequest]],
    layouts: Sequence[Layout],
    batch: Batch,
    shape: BatchShape,
) -> list[list[StepResult]]:
    """One per work, of a step's results as NumPy arrays.

    Args:
      layouts, batch: those that the step was made of.
    """
    tokens, logprobs = arrays.token.tolist(), arrays.logprob.tolist()
    tops = list(arrays.top_tokens), list(arrays.top_logprobs)
    drafts = None if arrays.drafts is None else arrays.drafts.tolist()

    def one(place: int, work: StepRequest, scored: TokenLogprobs | None) -> StepResult:
        if work.sampling is None:
            return StepResult([], [], scored)
        first, held = place * shape.samples, 0
        if work.drafts:
            guesses = work.tokens[len(work.tokens) - work.drafts :]
            held = next((n for n, guess in enumerate(guesses) if guess != tokens[first + n]), work.drafts)
        drawn = [
            SampledToken(tokens[row], logprobs[row], tops[0][row], tops[1][row])
            for row in range(first, first + held + 1)
        ]
        return StepResult(drawn, [] if drafts is None else drafts[place], scored)

    results = []
    for group, works in enumerate(groups):
        scored: Sequence[TokenLogprobs | None] = [None] * len(works)
        if arrays.scored is not None:
            scored = list(_scored(arrays.scored, group, layouts[group], batch))
        results.append([one(group * shape.requests + i, work, scored[i]) for i, work in enumerate(works)])
    return results


def _scored(arrays: TokenLogprobsArrays, group: int, layout: Layout, batch: Batch) -> Iterator[TokenLogprobs | None]:
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
        yield TokenLogprobs(logprobs[mine], top_tokens[mine], top_logprobs[mine]) if work.score else None
