"""A step's works as columns, read once from the Python objects: from here on, the host's work is NumPy's."""

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


@dataclasses.dataclass(frozen=True)
class Columns:
    """One dp group's `I` works with `M` tokens in all."""

    works: Sequence[StepRequest]
    new: Ints
    """[I] tokens of each."""
    cached: Ints
    drafts: Ints
    sampled: NDArray[np.bool_]
    """[I]: something is sampled after the work's tokens."""
    next_token: Ints
    """[I]; -1: not given."""
    tokens: Ints
    """[M]: those of work i are `start[i]` to `start[i + 1]`."""
    start: Ints
    room: Ints
    """[I]: positions below it may be written for a work: its tokens', and, as far as the request has pages, those of the
    drafts that the step recycles."""
    pages: Ints
    """The pages that `room` reaches, work after work."""
    page_owner: Ints
    """For each page its work."""
    page_column: Ints
    """For each page its place among its work's."""

    @property
    def end(self) -> Ints:
        """[I]: the position behind the last token."""
        return self.cached + self.new

    @classmethod
    def of(cls, works: Sequence[StepRequest], shape: BatchShape) -> Columns:
        """Reads the works.

        Raises:
          ValueError: a work without tokens, or whose tokens or pages are not lists of whole numbers.
        """
        facts = [
            (
                len(w.tokens),
                w.cached,
                w.drafts,
                w.sampling is not None,
                -1 if w.next_token is None else w.next_token,
                len(w.pages),
            )
            for w in works
        ]
        new, cached, drafts, sampled, next_token, held = np.array(facts, np.int64).reshape(-1, 6).T
        if not new.all():
            raise ValueError(f"work {int(np.argmin(new))}: needs at least 1 token, got none.")
        end, page_size = cached + new, shape.cache.page_size
        further = np.minimum(end + max(shape.draft_tokens - 1, 0), np.minimum(held, shape.table_width) * page_size)
        room = np.where(sampled, np.maximum(end, further), end)
        used = np.clip(-(-room // page_size), 0, held)
        return cls(
            works=works,
            new=new,
            cached=cached,
            drafts=drafts,
            sampled=sampled.astype(bool),
            next_token=next_token,
            tokens=_joined("tokens must be a list of token ids", [w.tokens for w in works]),
            start=np.concatenate([[0], np.cumsum(new)]),
            room=room,
            pages=_joined(
                "pages must be a list of page ids", [w.pages[:n] for w, n in zip(works, used.tolist(), strict=True)]
            ),
            page_owner=np.repeat(np.arange(len(works)), used),
            page_column=within(used),
        )


def within(counts: Ints) -> Ints:
    """0 to counts[0], 0 to counts[1], and so on.

    >>> within(np.array([2, 0, 3])).tolist()
    [0, 1, 0, 1, 2]
    """
    return np.arange(int(counts.sum())) - np.repeat(np.cumsum(counts) - counts, counts)


def _joined(needs: str, lists: Sequence[Any]) -> Ints:
    arrays = [_array(values) for values in lists]
    for i, got in enumerate(arrays):
        if got.ndim != 1 or (got.dtype.kind not in "iu" and len(got)):
            raise ValueError(f"work {i}: {needs}, got {got.dtype} of shape {got.shape}.")
    return np.concatenate(arrays).astype(np.int64) if arrays else np.zeros(0, np.int64)


def _array(values: Any) -> NDArray[Any]:
    if isinstance(values, list) and values:
        try:  # a few times as fast as np.asarray, and steps have thousands of pages
            return np.frombuffer(array.array("q", values), np.int64)
        except (TypeError, OverflowError):  # refused by its dtype
            pass
    return np.asarray(values)
