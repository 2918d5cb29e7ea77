"""A request's part of one step, as the scheduler hands it to the step."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from jax_mla_cp.batch.logit_bias import LogitBias


@dataclasses.dataclass(frozen=True)
class SamplingParams:
    """Choice of the next token. `temperature` 0 is greedy; `top_p` 1, `top_k` 0 and `min_p` 0 are off."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0
    min_p: float = 0.0
    """Minimum probability of a token that may be drawn, relative to the most likely one at this temperature."""


def last_sampled(slot: int) -> int:
    """Stands in `StepRequest.tokens` for the token that was sampled last for a request slot: the devices know it before the
    host does."""
    return -1 - slot


@dataclasses.dataclass(frozen=True)
class StepRequest:
    """One request's part of one step."""

    tokens: Sequence[int] | NDArray[np.integer[Any]]
    """The new tokens, at positions `num_computed_tokens` and following. The last `drafts` of them are drafts. A request's only new
    token may be `last_sampled(slot)`."""
    num_computed_tokens: int
    """Tokens before the new ones: their latents are in the pages already."""
    pages: Sequence[int]
    """The request's pages, in order; at least those that the new tokens reach. Ids are local to the dp group."""
    sampling: SamplingParams | None = None
    """None: nothing is sampled after these tokens (they end inside a prompt)."""
    embeds: NDArray[np.floating[Any]] | None = None
    """[len(tokens), D]: input embeddings in place of the tokens', for all requests of a step or for none."""
    drafts: int = 0
    """Number of drafts among the tokens: a token is sampled after the token before them and after each of them."""
    next_token: int | None = None
    """The token that follows, for tokens that end inside a prompt; the MTP layer reads it."""
    logit_bias: LogitBias | None = None
    """Applied to the logits of the token after these. Not with drafts: each draft would change it."""
    prompt_logprobs: bool = False
    """Return the log-probability of the token after each of these (`jax_mla_cp.step.results.TokenLogprobs`)."""
    slot: int | None = None
    """Request slot, 0 to `max_requests - 1`, in which the devices keep the request's pages and the token that is sampled after these
    (not with speculation, whose tokens the host has to read before the next step). A request that keeps its slot from step to step
    brings only pages that are new; without one, its pages may be sent again."""
