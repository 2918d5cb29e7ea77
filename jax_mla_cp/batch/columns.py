"""The requests of a step as columns, read once from the Python objects: from here on the host's work is NumPy's."""

from __future__ import annotations

import array
import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from jax_mla_cp.batch.shapes import BatchShape
from jax_mla_cp.batch.step_request import StepRequest

Ints = NDArray[np.int64]
NO_SLOT = 1 << 62
"""Beyond any slot."""


@dataclasses.dataclass(frozen=True)
class RequestColumns:
    """One dp group's `I` requests with `M` new tokens in all."""

    requests: Sequence[StepRequest]
    num_new_tokens: Ints
    """[I]: new tokens, drafts included."""
    num_computed_tokens: Ints
    """[I]"""
    num_drafts: Ints
    """[I]"""
    needs_sampling: NDArray[np.bool_]
    """[I]: a token is sampled after the request's tokens."""
    next_token: Ints
    """[I]; -1: not given."""
    slot: Ints
    """[I]; `NO_SLOT`: none."""
    tokens: Ints
    """[M]: those of request i are `start[i]` to `start[i + 1]`."""
    start: Ints
    """[I + 1]"""
    writable_end: Ints
    """[I]: positions below it may be written: those of the request's tokens, and, as far as it has pages, of the drafts that
    the step recycles."""
    pages: Ints
    """The pages up to `writable_end`, request after request."""
    page_request: Ints
    """For each page its request."""
    page_column: Ints
    """For each page its index among its request's."""
    page_start: Ints
    """[I + 1]: the pages of request i are `page_start[i]` to `page_start[i + 1]`."""

    @property
    def end(self) -> Ints:
        """[I]: the position behind the last token."""
        return self.num_computed_tokens + self.num_new_tokens

    def page(self, request: Ints, column: Ints) -> Ints:
        """The pages of requests at columns below their number of pages."""
        return self.pages[self.page_start[request] + column]

    @property
    def next_tokens(self) -> Ints:
        """[M]: the token after each; -1 where the step samples it, also where a draft follows."""
        following = np.append(self.tokens, -1)[1:]
        following[
            ragged_arange(self.num_new_tokens)
            >= np.repeat(self.num_new_tokens - 1 - self.num_drafts, self.num_new_tokens)
        ] = -1
        following[self.start[1:] - 1] = self.next_token
        return following

    @classmethod
    def of(cls, requests: Sequence[StepRequest], shape: BatchShape) -> RequestColumns:
        """Reads the requests.

        Raises:
          ValueError: a request without tokens, or whose tokens or pages are not lists of whole numbers.
        """
        facts = [
            (
                len(r.tokens),
                r.num_computed_tokens,
                r.drafts,
                r.sampling is not None,
                -1 if r.next_token is None else r.next_token,
                len(r.pages),
                NO_SLOT if r.slot is None else r.slot,
            )
            for r in requests
        ]
        num_new_tokens, num_computed_tokens, num_drafts, needs_sampling, next_token, num_pages, slot = (
            np.array(facts, np.int64).reshape(-1, 7).T
        )
        if not num_new_tokens.all():
            raise ValueError(f"request {int(np.argmin(num_new_tokens))}: needs at least 1 token, got none.")
        end, page_size = num_computed_tokens + num_new_tokens, shape.cache.page_size
        slots = np.minimum(num_pages, shape.max_pages) * page_size
        recycled_end = np.minimum(end + max(shape.draft_tokens - 1, 0), slots)
        writable_end = np.where(needs_sampling, np.maximum(end, recycled_end), end)
        used = np.clip(-(-writable_end // page_size), 0, num_pages)
        return cls(
            requests=requests,
            num_new_tokens=num_new_tokens,
            num_computed_tokens=num_computed_tokens,
            num_drafts=num_drafts,
            needs_sampling=needs_sampling.astype(bool),
            next_token=next_token,
            slot=slot,
            tokens=_joined("tokens must be a list of token ids", [r.tokens for r in requests]),
            start=np.concatenate([[0], np.cumsum(num_new_tokens)]),
            writable_end=writable_end,
            pages=_joined(
                "pages must be a list of page ids", [r.pages[:n] for r, n in zip(requests, used.tolist(), strict=True)]
            ),
            page_request=np.repeat(np.arange(len(requests)), used),
            page_column=ragged_arange(used),
            page_start=np.concatenate([[0], np.cumsum(used)]),
        )


def ragged_arange(counts: Ints) -> Ints:
    """0 to counts[0], 0 to counts[1], and so on.

    >>> ragged_arange(np.array([2, 0, 3])).tolist()
    [0, 1, 0, 1, 2]
    """
    return np.arange(int(counts.sum())) - np.repeat(np.cumsum(counts) - counts, counts)


def _joined(rule: str, lists: Sequence[Any]) -> Ints:
    arrays = [_array(values) for values in lists]
    for i, got in enumerate(arrays):
        if got.ndim != 1 or (got.dtype.kind not in "iu" and len(got)):
            raise ValueError(f"request {i}: {rule}, got {got.dtype} of shape {got.shape}.")
    return np.concatenate(arrays).astype(np.int64) if arrays else np.zeros(0, np.int64)


def _array(values: Any) -> NDArray[Any]:
    if isinstance(values, list) and values:
        try:  # a few times as fast as np.asarray, and steps have thousands of pages
            return np.frombuffer(array.array("q", values), np.int64)
        except (TypeError, OverflowError):  # refused by its dtype
            pass
    return np.asarray(values)
