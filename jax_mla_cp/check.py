"""What is wrong with a step's works: JAX would clamp or drop it silently, so it is refused before a device sees it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from jax_mla_cp.batch import BatchShape, Work
from jax_mla_cp.config import ModelConfig


def check_works(works: Sequence[Work], shape: BatchShape, config: ModelConfig) -> None:
    """Looks at a dp group's works.

    Raises:
      ValueError: a work that doesn't fit the shape, the pages or the vocabulary.
    """
    if len(works) > shape.requests:
        raise ValueError(f"a step takes at most {shape.requests} requests of a dp group, got {len(works)}.")
    for i, work in enumerate(works):
        _check(i, work, shape, config)
    _check_pages(works, shape)


def _check(i: int, work: Work, shape: BatchShape, config: ModelConfig) -> None:
    new, page_size = len(work.tokens), shape.cache.page_size
    if new < 1 or work.cached < 0:
        raise ValueError(f"work {i}: needs at least 1 token and cached >= 0, got {new} and {work.cached}.")
    if work.cached + new > config.max_position:
        raise ValueError(f"work {i}: {work.cached} + {new} tokens exceed the model's {config.max_position} positions.")
    needed = -(-(work.cached + new) // page_size)
    if not needed <= len(work.pages):
        raise ValueError(
            f"work {i}: {work.cached + new} tokens need {needed} pages of {page_size}, got {len(work.pages)}."
        )
    if needed > shape.table_width:
        raise ValueError(f"work {i}: needs {needed} pages, the page table holds {shape.table_width}.")
    ids = np.asarray(work.tokens)
    if not np.issubdtype(ids.dtype, np.integer) or ids.ndim != 1:
        raise ValueError(f"work {i}: tokens must be a list of token ids, got {ids.dtype} of shape {ids.shape}.")
    if work.embeds is not None:
        if np.shape(work.embeds) != (new, config.hidden_size):
            raise ValueError(f"work {i}: embeds must be [{new}, {config.hidden_size}], got {np.shape(work.embeds)}.")
        if shape.draft_tokens:
            raise ValueError(f"work {i}: embeds can't be combined with draft_tokens: the MTP layer reads token ids.")
    else:
        _check_ids(i, ids, config)
    _check_drafts(i, work, shape, config)


def _check_ids(i: int, ids: NDArray[np.integer[Any]], config: ModelConfig) -> None:
    if ids.min() < 0 or ids.max() >= config.vocab_size:
        bad = int(ids[(ids < 0) | (ids >= config.vocab_size)][0])
        raise ValueError(f"work {i}: token id {bad} is not in the vocabulary (0 to {config.vocab_size - 1}).")


def _check_drafts(i: int, work: Work, shape: BatchShape, config: ModelConfig) -> None:
    most = min(shape.draft_tokens, len(work.tokens) - 1)
    if not 0 <= work.drafts <= most:
        raise ValueError(
            f"work {i}: drafts must be 0 to {most} (the planner's draft_tokens, and fewer than the tokens), "
            f"got {work.drafts}."
        )
    if work.drafts and work.sampling is None:
        raise ValueError(f"work {i}: drafts are verified by sampling; give sampling too.")
    if work.next_token is not None:
        if work.sampling is not None:
            raise ValueError(f"work {i}: next_token is for tokens after which nothing is sampled.")
        _check_ids(i, np.array([work.next_token]), config)


def _check_pages(works: Sequence[Work], shape: BatchShape) -> None:
    """Page ids are in range, and no page is written by two requests (reading one together is fine)."""
    writer: dict[int, int] = {}
    page_size, pages = shape.cache.page_size, shape.cache.pages_per_layer
    for i, work in enumerate(works):
        used = np.asarray(work.pages[: -(-shape.room(work) // page_size)])
        if used.min() < 0 or used.max() >= pages:
            raise ValueError(f"work {i}: page ids must be 0 to {pages - 1}, got {used.min()} to {used.max()}.")
        for page in used[work.cached // page_size :].tolist():
            if writer.setdefault(page, i) != i:
                raise ValueError(f"work {i}: page {page} is also written by work {writer[page]}.")
        if len(set(used.tolist())) != len(used):
            raise ValueError(f"work {i}: a page is listed twice.")
