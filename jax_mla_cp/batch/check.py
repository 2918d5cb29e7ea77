"""What is wrong with a step's works: JAX would clamp or drop it silently, so it is refused before a device sees it."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from jax_mla_cp.batch.columns import Columns
from jax_mla_cp.batch.logit_bias import LogitBias
from jax_mla_cp.batch.shapes import BatchShape
from jax_mla_cp.config.model import ModelConfig


def check_works(c: Columns, shape: BatchShape, config: ModelConfig) -> None:
    """Looks at a dp group's works.

    Raises:
      ValueError: a work that doesn't fit the shape, the pages or the vocabulary, with its number.
    """
    if len(c.works) > shape.requests:
        raise ValueError(f"a step takes at most {shape.requests} requests of a dp group, got {len(c.works)}.")
    if not c.works:
        return
    if (i := _first(c.cached < 0)) is not None:
        raise ValueError(f"work {i}: needs cached >= 0, got {c.cached[i]}.")
    if (i := _first(c.end > config.max_position)) is not None:
        raise ValueError(
            f"work {i}: {c.cached[i]} + {c.new[i]} tokens exceed the model's {config.max_position} positions."
        )
    _check_pages(c, shape)
    _check_tokens(c, shape, config)
    _check_drafts(c, shape)
    for i, work in enumerate(c.works):
        if work.logit_bias is not None:
            _check_logit_bias(i, work.logit_bias, bool(c.sampled[i]), int(c.drafts[i]), config.vocab_size)


def _first(bad: NDArray[np.bool_]) -> int | None:
    """The first work that is bad."""
    return int(np.argmax(bad)) if bad.any() else None


def _check_pages(c: Columns, shape: BatchShape) -> None:
    """There are enough, in range, and none is written by two requests (reading one together is fine)."""
    page_size, pages = shape.cache.page_size, shape.cache.pages_per_layer
    needed, held = -(-c.end // page_size), np.bincount(c.page_owner, minlength=len(c.works))
    if (i := _first(held < needed)) is not None:
        raise ValueError(f"work {i}: {c.end[i]} tokens need {needed[i]} pages of {page_size}, got {held[i]}.")
    if (i := _first(needed > shape.table_width)) is not None:
        raise ValueError(f"work {i}: needs {needed[i]} pages, the page table holds {shape.table_width}.")
    if (at := _first((c.pages < 0) | (c.pages >= pages))) is not None:
        i = int(c.page_owner[at])
        used = c.pages[c.page_owner == i]
        raise ValueError(f"work {i}: page ids must be 0 to {pages - 1}, got {used.min()} to {used.max()}.")
    written = c.page_column >= (c.cached // page_size)[c.page_owner]
    page, owner = c.pages[written], c.page_owner[written]
    writer = np.empty(pages, np.int64)
    writer[page[::-1]] = owner[::-1]  # the first of several is what stays
    if (at := _first(writer[page] != owner)) is not None:
        raise ValueError(f"work {owner[at]}: page {page[at]} is also written by work {writer[page[at]]}.")
    both = np.sort(c.page_owner * pages + c.pages)
    if (at := _first(both[1:] == both[:-1])) is not None:
        raise ValueError(f"work {both[at] // pages}: a page is listed twice.")


def _check_tokens(c: Columns, shape: BatchShape, config: ModelConfig) -> None:
    vocabulary = range(config.vocab_size)
    embeds = np.array([work.embeds is not None for work in c.works])
    for i in np.flatnonzero(embeds).tolist():
        got = np.asarray(c.works[i].embeds).shape
        if got != (c.new[i], config.hidden_size):
            raise ValueError(f"work {i}: embeds must be [{c.new[i]}, {config.hidden_size}], got {got}.")
        if shape.draft_tokens:
            raise ValueError(f"work {i}: embeds can't be combined with draft_tokens: the MTP layer reads token ids.")
    bad = ((c.tokens < 0) | (c.tokens >= len(vocabulary))) & ~np.repeat(embeds, c.new)
    if (at := _first(bad)) is not None:
        raise _unknown(int(np.searchsorted(c.start, at, "right")) - 1, c.tokens[at], config.vocab_size)
    for i, work in enumerate(c.works):
        if work.next_token is None:
            continue
        if work.sampling is not None:
            raise ValueError(f"work {i}: next_token is for tokens after which nothing is sampled.")
        if work.next_token not in vocabulary:
            raise _unknown(i, work.next_token, config.vocab_size)


def _unknown(i: int, token: Any, vocab_size: int) -> ValueError:
    return ValueError(f"work {i}: token id {token} is not in the vocabulary (0 to {vocab_size - 1}).")


def _check_drafts(c: Columns, shape: BatchShape) -> None:
    most = np.minimum(shape.draft_tokens, c.new - 1)
    if (i := _first((c.drafts < 0) | (c.drafts > most))) is not None:
        raise ValueError(
            f"work {i}: drafts must be 0 to {most[i]} (the planner's draft_tokens, and fewer than the tokens), "
            f"got {c.drafts[i]}."
        )
    if (i := _first((c.drafts > 0) & ~c.sampled)) is not None:
        raise ValueError(f"work {i}: drafts are verified by sampling; give sampling too.")


def _check_logit_bias(i: int, logit_bias: LogitBias, sampled: bool, drafts: int, vocab_size: int) -> None:
    if not sampled:
        raise ValueError(f"work {i}: logit_bias is for tokens after which one is sampled; give sampling too.")
    if drafts:
        raise ValueError(
            f"work {i}: logit_bias can't be combined with drafts, of which each changes it. Give no drafts."
        )
    tokens, add, scale, mask = logit_bias.tokens, logit_bias.add, logit_bias.scale, logit_bias.mask
    if tokens.ndim != 1 or tokens.dtype.kind not in "iu" or not tokens.shape == add.shape == scale.shape:
        raise ValueError(
            f"work {i}: logit_bias needs equally long lists, of whole numbers and floats, got {tokens.dtype} {tokens.shape}, "
            f"{add.dtype} {add.shape} and {scale.dtype} {scale.shape}."
        )
    if (at := _first((tokens < 0) | (tokens >= vocab_size))) is not None:
        raise _unknown(i, tokens[at], vocab_size)
    if (tokens[1:] <= tokens[:-1]).any():
        raise ValueError(f"work {i}: logit_bias.tokens must rise strictly. Sort them and name each once.")
    if (at := _first(~(add < np.inf) | ~(scale > 0) | ~(scale < np.inf))) is not None:
        raise ValueError(
            f"work {i}: logit_bias of token {tokens[at]}: add must be finite or -inf and scale positive, got {add[at]} and "
            f"{scale[at]}."
        )
    words = -(-vocab_size // 32)
    if mask is not None and (mask.dtype != np.uint32 or mask.shape != (words,)):
        raise ValueError(f"work {i}: logit_bias.mask must be uint32 [{words}], got {mask.dtype} {list(mask.shape)}.")
    if not logit_bias.allows_any(vocab_size):
        raise ValueError(f"work {i}: logit_bias leaves no token that could be chosen. Allow at least one.")
