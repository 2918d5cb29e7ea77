"""Checks of a step's requests on the host: JAX would silently clamp or drop what is out of range."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from jax_mla_cp.batch.columns import NO_SLOT, RequestColumns
from jax_mla_cp.batch.logit_bias import LogitBias
from jax_mla_cp.batch.shapes import BatchShape
from jax_mla_cp.config.model import ModelConfig


def check_requests(c: RequestColumns, shape: BatchShape, config: ModelConfig) -> None:
    """Checks one dp group's requests.

    Raises:
      ValueError: a request doesn't fit the shape, its pages or the vocabulary; names it by its number.
    """
    if len(c.requests) > shape.max_requests:
        raise ValueError(f"a step takes at most {shape.max_requests} requests of a dp group, got {len(c.requests)}.")
    if not c.requests:
        return
    if (i := _first(c.num_computed_tokens < 0)) is not None:
        raise ValueError(f"request {i}: num_computed_tokens must be at least 0, got {c.num_computed_tokens[i]}.")
    if (i := _first(c.end > config.max_position)) is not None:
        raise ValueError(
            f"request {i}: {c.num_computed_tokens[i]} + {c.num_new_tokens[i]} tokens exceed the model's {config.max_position} positions."
        )
    _check_pages(c, shape)
    _check_tokens(c, shape, config)
    _check_drafts(c, shape)
    _check_slots(c, shape)
    for i, request in enumerate(c.requests):
        if request.logit_bias is not None:
            _check_logit_bias(i, request.logit_bias, bool(c.needs_sampling[i]), int(c.num_drafts[i]), config.vocab_size)


def _first(bad: NDArray[np.bool_]) -> int | None:
    """Index of the first True."""
    return int(np.argmax(bad)) if bad.any() else None


def _check_pages(c: RequestColumns, shape: BatchShape) -> None:
    """Each request has enough pages, all in range, and no two requests write the same one (they may read it)."""
    page_size, pages = shape.cache.page_size, shape.cache.pages_per_layer
    needed, given = -(-c.end // page_size), np.bincount(c.page_request, minlength=len(c.requests))
    if (i := _first(given < needed)) is not None:
        raise ValueError(f"request {i}: {c.end[i]} tokens need {needed[i]} pages of {page_size}, got {given[i]}.")
    if (i := _first(needed > shape.max_pages)) is not None:
        raise ValueError(f"request {i}: needs {needed[i]} pages, the page table holds {shape.max_pages}.")
    if (at := _first((c.pages < 0) | (c.pages >= pages))) is not None:
        i = int(c.page_request[at])
        used = c.pages[c.page_request == i]
        raise ValueError(f"request {i}: page ids must be 0 to {pages - 1}, got {used.min()} to {used.max()}.")
    written = c.page_column >= (c.num_computed_tokens // page_size)[c.page_request]
    page, request = c.pages[written], c.page_request[written]
    writer = np.empty(pages, np.int64)
    writer[page[::-1]] = request[::-1]  # of several, the first one stays
    if (at := _first(writer[page] != request)) is not None:
        raise ValueError(f"request {request[at]}: page {page[at]} is also written by request {writer[page[at]]}.")
    keys = np.sort(c.page_request * pages + c.pages)
    if (at := _first(keys[1:] == keys[:-1])) is not None:
        raise ValueError(f"request {keys[at] // pages}: a page is listed twice.")


def _check_tokens(c: RequestColumns, shape: BatchShape, config: ModelConfig) -> None:
    vocabulary = range(config.vocab_size)
    embeds = np.array([request.embeds is not None for request in c.requests])
    for i in np.flatnonzero(embeds).tolist():
        got = np.asarray(c.requests[i].embeds).shape
        if got != (c.num_new_tokens[i], config.hidden_size):
            raise ValueError(f"request {i}: embeds must be [{c.num_new_tokens[i]}, {config.hidden_size}], got {got}.")
        if shape.draft_tokens:
            raise ValueError(f"request {i}: embeds can't be combined with draft_tokens: the MTP layer reads token ids.")
    # A decoding request's only token may be named by its slot.
    may_name = (c.num_new_tokens == 1) & (shape.draft_tokens == 0)
    least = np.repeat(np.where(may_name, -shape.max_requests, 0), c.num_new_tokens)
    bad = ((c.tokens < least) | (c.tokens >= len(vocabulary))) & ~np.repeat(embeds, c.num_new_tokens)
    if (at := _first(bad)) is not None:
        raise _unknown(int(np.searchsorted(c.start, at, "right")) - 1, c.tokens[at], config.vocab_size)
    for i, request in enumerate(c.requests):
        if request.next_token is None:
            continue
        if request.sampling is not None:
            raise ValueError(f"request {i}: next_token is for tokens after which nothing is sampled.")
        if request.next_token not in vocabulary:
            raise _unknown(i, request.next_token, config.vocab_size)


def _unknown(i: int, token: Any, vocab_size: int) -> ValueError:
    return ValueError(f"request {i}: token id {token} is not in the vocabulary (0 to {vocab_size - 1}).")


def _check_drafts(c: RequestColumns, shape: BatchShape) -> None:
    allowed = np.minimum(shape.draft_tokens, c.num_new_tokens - 1)
    if (i := _first((c.num_drafts < 0) | (c.num_drafts > allowed))) is not None:
        raise ValueError(
            f"request {i}: drafts must be 0 to {allowed[i]} (the planner's draft_tokens, and fewer than the tokens), "
            f"got {c.num_drafts[i]}."
        )
    if (i := _first((c.num_drafts > 0) & ~c.needs_sampling)) is not None:
        raise ValueError(f"request {i}: drafts are verified by sampling; give sampling too.")


def _check_slots(c: RequestColumns, shape: BatchShape) -> None:
    given = c.slot != NO_SLOT
    if (i := _first(given & ((c.slot < 0) | (c.slot >= shape.max_requests)))) is not None:
        raise ValueError(f"request {i}: slot must be 0 to {shape.max_requests - 1}, got {c.slot[i]}.")
    used = np.sort(c.slot[given])
    if (at := _first(used[1:] == used[:-1])) is not None:
        raise ValueError(f"slot {used[at]} is given to two requests.")


def _check_logit_bias(i: int, logit_bias: LogitBias, sampled: bool, drafts: int, vocab_size: int) -> None:
    if not sampled:
        raise ValueError(f"request {i}: logit_bias is for tokens after which one is sampled; give sampling too.")
    if drafts:
        raise ValueError(
            f"request {i}: logit_bias can't be combined with drafts: each of them would change it. Leave the drafts out."
        )
    tokens, add, scale, mask = logit_bias.tokens, logit_bias.add, logit_bias.scale, logit_bias.mask
    if tokens.ndim != 1 or tokens.dtype.kind not in "iu" or not tokens.shape == add.shape == scale.shape:
        raise ValueError(
            f"request {i}: logit_bias needs equally long lists, of whole numbers and floats, got {tokens.dtype} {tokens.shape}, "
            f"{add.dtype} {add.shape} and {scale.dtype} {scale.shape}."
        )
    if (at := _first((tokens < 0) | (tokens >= vocab_size))) is not None:
        raise _unknown(i, tokens[at], vocab_size)
    if (tokens[1:] <= tokens[:-1]).any():
        raise ValueError(f"request {i}: logit_bias.tokens must rise strictly. Sort them and name each once.")
    if (at := _first(~(add < np.inf) | ~(scale > 0) | ~(scale < np.inf))) is not None:
        raise ValueError(
            f"request {i}: logit_bias of token {tokens[at]}: add must be finite or -inf and scale positive, got {add[at]} and "
            f"{scale[at]}."
        )
    words = -(-vocab_size // 32)
    if mask is not None and (mask.dtype != np.uint32 or mask.shape != (words,)):
        raise ValueError(f"request {i}: logit_bias.mask must be uint32 [{words}], got {mask.dtype} {list(mask.shape)}.")
    if not logit_bias.allows_any(vocab_size):
        raise ValueError(f"request {i}: logit_bias leaves no token that could be chosen. Allow at least one.")
