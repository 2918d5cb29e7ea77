"""Who owns which tokens of a step: the zigzag of context parallelism. Pure NumPy, no JAX.

Causal attention makes late tokens dearer than early ones. A request's new tokens are cut into `2 cp` chunks, and rank k
takes chunks k and `2 cp - 1 - k`, one cheap and one dear, so that all ranks do the same work. cp=2, 8 tokens:

    chunk      0     1     2     3
    token     0 1   2 3   4 5   6 7
    rank       0     1     1     0

>>> p = plan([8], [0], cp=2)
>>> [p.offset[p.rank_start[k]:p.rank_start[k + 1]].tolist() for k in range(2)]
[[0, 1, 6, 7], [2, 3, 4, 5]]

Each chunk is a row of the attention call. Its last query sees `kv_len` keys (the cached prefix and the request's new
tokens up to the chunk's end), and masks aligned to the bottom right do the rest:

>>> [(int(r), int(n), int(kv)) for r, n, kv in zip(p.row_rank, p.row_len, p.row_kv_len)]
[(0, 2, 2), (0, 2, 8), (1, 2, 4), (1, 2, 6)]

A request with fewer than `2 cp` new tokens, a decode step's single token above all, is one row on the least loaded rank:

>>> plan([8, 1, 1], [0, 30, 9], cp=2).last_rank.tolist()
[0, 0, 1]

The cut is floor(j L / 2 cp), which keeps the ranks' token counts within 2 of each other for any L; equal chunks with a
short last one would leave one rank with the dear end and nothing of the cheap one.
"""

from __future__ import annotations

import dataclasses
import heapq
from collections.abc import Sequence

import numpy as np


@dataclasses.dataclass(frozen=True)
class Plan:
    """Every new token of a step in rank order: rank 0's tokens, then rank 1's, each rank's by request and chunk.

    All arrays are int32. `M` is the step's tokens, `B` its rows, `I` its requests.
    """

    cp: int
    rank_start: np.ndarray
    """[cp + 1]: rank k owns tokens `rank_start[k]` to `rank_start[k + 1]` of the rank order."""
    request: np.ndarray
    """[M]: the token's request."""
    offset: np.ndarray
    """[M]: the token's place among its request's new tokens; its position is the request's prefix plus this."""
    row_rank: np.ndarray
    """[B]: the row's rank. Rows are sorted by rank, and follow each other without gaps within it."""
    row_request: np.ndarray
    """[B]"""
    row_len: np.ndarray
    """[B]: queries in the row, at least 1."""
    row_kv_len: np.ndarray
    """[B]: keys that the row's last query sees; its query j of n sees `row_kv_len - n + 1 + j`."""
    last_rank: np.ndarray
    """[I]: the rank with the request's last token."""
    last_index: np.ndarray
    """[I]: where on that rank, counted from its first token."""

    @property
    def rank_tokens(self) -> np.ndarray:
        """[cp]: tokens of each rank."""
        return np.diff(self.rank_start)

    def rank_pairs(self) -> np.ndarray:
        """[cp] int64: query-key pairs of each rank, what its attention costs."""
        n, kv = self.row_len.astype(np.int64), self.row_kv_len.astype(np.int64)
        pairs = n * kv - n * (n - 1) // 2
        return np.bincount(self.row_rank, weights=pairs, minlength=self.cp).astype(np.int64)

    def inverse(self) -> np.ndarray:
        """[M] int32: where each token of the sequence order (request after request) stands in the rank order."""
        return np.lexsort((self.offset, self.request)).astype(np.int32)


def plan(new: Sequence[int] | np.ndarray, prefix: Sequence[int] | np.ndarray, *, cp: int) -> Plan:
    """Divides requests with `new[i]` tokens to compute, after `prefix[i]` cached ones, over `cp` ranks.

    For a request with `L >= 2 cp` the ranks' shares differ by at most 2 tokens and `2 (P + L)` query-key pairs.

    Raises:
      ValueError: cp below 1, lengths that differ, a request without new tokens, a negative prefix.
    """
    length, cached = np.asarray(new, np.int64), np.asarray(prefix, np.int64)
    if cp < 1:
        raise ValueError(f"cp must be at least 1, got {cp}.")
    if length.ndim != 1 or length.shape != cached.shape:
        raise ValueError(f"new and prefix must be equally long lists, got shapes {length.shape} and {cached.shape}.")
    if (length < 1).any() or (cached < 0).any():
        i = int(np.argmax((length < 1) | (cached < 0)))
        raise ValueError(f"request {i}: needs at least 1 new token and 0 cached ones, got {length[i]} and {cached[i]}.")

    rank, request, start, stop = _rows(length, cached, cp)
    order = np.lexsort((start, request, rank))
    rank, request, start, stop = rank[order], request[order], start[order], stop[order]
    row_len = stop - start
    row_first = np.cumsum(row_len) - row_len  # in the rank order, which the sorted rows are
    tokens = np.repeat(np.arange(len(row_len)), row_len)
    rank_start = np.concatenate([[0], np.cumsum(np.bincount(rank, weights=row_len, minlength=cp))]).astype(np.int64)
    ends = stop == length[request]
    last_rank, last_index = np.empty_like(length), np.empty_like(length)
    last_rank[request[ends]] = rank[ends]
    last_index[request[ends]] = (row_first + row_len - 1 - rank_start[rank])[ends]
    arrays = {
        "rank_start": rank_start,
        "request": request[tokens],
        "offset": np.arange(len(tokens)) - row_first[tokens] + start[tokens],
        "row_rank": rank,
        "row_request": request,
        "row_len": row_len,
        "row_kv_len": cached[request] + stop,
        "last_rank": last_rank,
        "last_index": last_index,
    }
    return Plan(cp=cp, **{name: array.astype(np.int32) for name, array in arrays.items()})


def loads(
    new: Sequence[int] | np.ndarray, prefix: Sequence[int] | np.ndarray, *, cp: int
) -> tuple[np.ndarray, np.ndarray]:
    """How `plan` divides such requests, without the arrays of their tokens.

    Returns:
      int64 [cp], twice: `Plan.rank_tokens` and `Plan.rank_pairs`.
    """
    length, cached = np.asarray(new, np.int64), np.asarray(prefix, np.int64)
    rank, request, start, stop = _rows(length, cached, cp)
    n, kv = stop - start, cached[request] + stop
    pairs = np.bincount(rank, weights=n * kv - n * (n - 1) // 2, minlength=cp)
    return np.bincount(rank, weights=n, minlength=cp).astype(np.int64), pairs.astype(np.int64)


def _rows(length: np.ndarray, cached: np.ndarray, cp: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """(rank, request, start, stop) of every row, in no order: tokens [start, stop) of the request's new ones."""
    split = np.flatnonzero(length >= 2 * cp)
    whole = np.flatnonzero(length < 2 * cp)
    chunk = np.arange(2 * cp)
    owner = np.minimum(chunk, 2 * cp - 1 - chunk)
    cuts = np.arange(2 * cp + 1) * length[split, None] // (2 * cp)
    start, stop = cuts[:, :-1], cuts[:, 1:]
    ranks = np.broadcast_to(owner, start.shape)

    # Short requests, dearest first, to the rank with the fewest tokens, then the fewest pairs: tokens set the size of
    # the step's buffer, which every rank pays for.
    count, end = stop - start, cached[split, None] + stop
    tokens = np.bincount(ranks.ravel(), weights=count.ravel(), minlength=cp)
    pairs = np.bincount(ranks.ravel(), weights=(count * end - count * (count - 1) // 2).ravel(), minlength=cp)
    heap = [(int(tokens[k]), int(pairs[k]), k) for k in range(cp)]
    heapq.heapify(heap)
    chosen = np.zeros(len(length), np.int64)
    order = whole[np.lexsort((-cached[whole], -length[whole]))] if cp > 1 else whole[:0]
    size, kv = length[order], cached[order] + length[order]
    dear = size * kv - size * (size - 1) // 2
    taken = []
    for new, more in zip(size.tolist(), dear.tolist(), strict=True):
        n, work, k = heap[0]
        taken.append(k)
        heapq.heapreplace(heap, (n + new, work + more, k))
    chosen[order] = taken

    return (
        np.concatenate([ranks.ravel(), chosen[whole]]),
        np.concatenate([np.repeat(split, 2 * cp), whole]),
        np.concatenate([start.ravel(), np.zeros(len(whole), np.int64)]),
        np.concatenate([stop.ravel(), length[whole]]),
    )
