"""A step's results: from the devices' arrays to one `StepResult` per request."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from jax_mla_cp.batch.columns import Ints
from jax_mla_cp.batch.layout import GroupLayout, StepLayout
from jax_mla_cp.batch.shapes import BatchShape
from jax_mla_cp.batch.step_request import StepRequest
from jax_mla_cp.step.sampling import SamplerOutput, TokenLogprobsArrays


@dataclasses.dataclass(frozen=True)
class SampledToken:
    """A sampled token, its log-probability, and the 20 most likely tokens with theirs: the model's own, before any logit bias."""

    token: int
    logprob: float
    top_tokens: np.ndarray
    top_logprobs: np.ndarray


@dataclasses.dataclass(frozen=True)
class TokenLogprobs:
    """The model's own prediction after each of a request's new tokens, before any logit bias.

    NaN where the token after it is not known: behind the last one, if the request has no `next_token`, and before drafts.
    The log-probability of a token that is among the most likely ones is the same float there.
    """

    logprobs: NDArray[np.float32]
    """[len(request.tokens)]: of the token after each."""
    top_tokens: NDArray[np.int32]
    """[len(request.tokens), 20]: the most likely ones (fewer, if the vocabulary is smaller)."""
    top_logprobs: NDArray[np.float32]
    """[len(request.tokens), 20]"""


@dataclasses.dataclass(frozen=True)
class StepResult:
    """One request's part of a step's results."""

    sampled: list[SampledToken]
    """Empty if the request samples nothing; else its accepted drafts and the token after them."""
    drafts: list[int]
    """Drafts of the tokens that follow, for the request's next step."""
    prompt_logprobs: TokenLogprobs | None = None
    """Set for requests with `prompt_logprobs`."""


@dataclasses.dataclass(frozen=True)
class RunnerOutput:
    """The results of a step, and its load."""

    results: list[list[StepResult]]
    """One per request, per dp group."""
    rank_tokens: Ints
    """[cp]: `StepLayout.rank_tokens`."""
    rank_pairs: Ints
    """[cp]: `StepLayout.rank_pairs`."""


def read_results(arrays: SamplerOutput, layout: StepLayout, shape: BatchShape) -> RunnerOutput:
    """Reads the step's output.

    Args:
      arrays: the output, as NumPy arrays.
      layout: of the step that gave them.
    """
    tokens, logprobs = arrays.token.tolist(), arrays.logprob.tolist()
    top_tokens, top_logprobs = list(arrays.top_tokens), list(arrays.top_logprobs)
    drafts = None if arrays.drafts is None else arrays.drafts.tolist()

    def result(place: int, request: StepRequest, prompt_logprobs: TokenLogprobs | None) -> StepResult:
        if request.sampling is None:
            return StepResult([], [], prompt_logprobs)
        first, num_accepted = place * shape.samples_per_request, 0
        if request.drafts:
            proposed = request.tokens[len(request.tokens) - request.drafts :]
            num_accepted = next((n for n, d in enumerate(proposed) if d != tokens[first + n]), request.drafts)
        sampled = [
            SampledToken(tokens[row], logprobs[row], top_tokens[row], top_logprobs[row])
            for row in range(first, first + num_accepted + 1)
        ]
        return StepResult(sampled, [] if drafts is None else drafts[place], prompt_logprobs)

    results = []
    for g, group in enumerate(layout.groups):
        requests = group.columns.requests
        prompt_logprobs: Sequence[TokenLogprobs | None] = [None] * len(requests)
        if arrays.prompt_logprobs is not None:
            prompt_logprobs = list(_token_logprobs(arrays.prompt_logprobs, g, group, layout.step.tokens))
        places = range(g * shape.max_requests, g * shape.max_requests + len(requests))
        results.append([result(*args) for args in zip(places, requests, prompt_logprobs, strict=True)])
    return RunnerOutput(results, layout.rank_tokens, layout.rank_pairs)


def _token_logprobs(
    arrays: TokenLogprobsArrays, number: int, group: GroupLayout, tokens: int
) -> Iterator[TokenLogprobs | None]:
    """From the buffers of group `number`'s ranks, `tokens` each, to the order of each request's tokens."""
    index, token = group.buffer_index(tokens)
    where = np.empty_like(index)
    where[token] = index + number * group.plan.cp * tokens
    logprobs = np.where(group.columns.next_tokens < 0, np.float32(np.nan), arrays.logprob[where])
    top_tokens, top_logprobs = arrays.top_tokens[where], arrays.top_logprobs[where]
    start = group.columns.start.tolist()
    for request, first, end in zip(group.columns.requests, start, start[1:], strict=False):
        span = slice(first, end)
        yield TokenLogprobs(logprobs[span], top_tokens[span], top_logprobs[span]) if request.prompt_logprobs else None
