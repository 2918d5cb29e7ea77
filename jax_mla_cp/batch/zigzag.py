"""The zigzag of context parallelism: each cp rank's tokens of a step. Pure NumPy, no JAX.

Causal attention makes late tokens more expensive than early ones. A request's new tokens are cut into `2 cp` chunks, and rank k
takes chunks k and `2 cp - 1 - k`, one cheap and one expensive, so that all ranks do the same work. cp=2, 8 tokens:

    chunk      0     1     2     3
    token     0 1   2 3   4 5   6 7
    rank       0     1     1     0

>>> p = plan([8], [0], cp=2)
>>> [p.offset[p.rank_start[k]:p.rank_start[k + 1]].tolist() for k in range(2)]
[[0, 1, 6, 7], [2, 3, 4, 5]]

Each chunk is a row of the attention call. Its last query sees `kv_len` keys (the computed prefix and the request's new
tokens up to the chunk's end); causal masks are aligned to the bottom right, so no other mask is needed:

>>> [(int(r), int(n), int(kv)) for r, n, kv in zip(p.row_rank, p.row_len, p.row_kv_len)]
[(0, 2, 2), (0, 2, 8), (1, 2, 4), (1, 2, 6)]

A request with fewer than `2 cp` new tokens, a decode step's single token above all, is one row on the least loaded rank:

>>> p = plan([8, 1, 1], [0, 30, 9], cp=2)
>>> [(int(i), int(r)) for i, r in zip(p.row_request, p.row_rank) if i > 0]
[(1, 0), (2, 1)]

Chunk j begins at floor(j L / 2 cp), which keeps the ranks' token counts within 2 of each other for any L. Equal chunks with a
short last one would leave one rank with the expensive end and little of the cheap beginning.
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
    """[M]: the token's place among its request's new tokens; its position is this plus the request's computed tokens."""
    row_rank: np.ndarray
    """[B]: the row's rank. Rows are sorted by rank, and follow each other without gaps within it."""
    row_request: np.ndarray
    """[B]"""
    row_len: np.ndarray
    """[B]: queries in the row, at least 1."""
    row_kv_len: np.ndarray
    """[B]: keys that the row's last query sees; its query j of n sees `row_kv_len - n + 1 + j`."""

    @property
    def rank_tokens(self) -> np.ndarray:
        """[cp]: tokens of each rank."""
        return np.diff(self.rank_start)

    def rank_pairs(self) -> np.ndarray:
        """[cp] int64: query-key pairs of each rank, what its attention costs."""
        pairs = _pairs(self.row_len.astype(np.int64), self.row_kv_len.astype(np.int64))
        return np.bincount(self.row_rank, weights=pairs, minlength=self.cp).astype(np.int64)


def plan(
    num_new_tokens: Sequence[int] | np.ndarray, num_computed_tokens: Sequence[int] | np.ndarray, *, cp: int
) -> Plan:
    """Divides requests with `num_new_tokens[i]` tokens to compute, after `num_computed_tokens[i]` in the cache, over `cp` ranks.

    For a request with `L >= 2 cp` the ranks' shares differ by at most 2 tokens and `2 (P + L)` query-key pairs.

    Raises:
      ValueError: cp below 1, lists of different lengths, a request without new tokens, a negative number of computed ones.
    """
    length, computed = np.asarray(num_new_tokens, np.int64), np.asarray(num_computed_tokens, np.int64)
    if cp < 1:
        raise ValueError(f"cp must be at least 1, got {cp}.")
    if length.ndim != 1 or length.shape != computed.shape:
        raise ValueError(
            f"num_new_tokens and num_computed_tokens must be equally long lists, got shapes {length.shape} and {computed.shape}."
        )
    if (length < 1).any() or (computed < 0).any():
        i = int(np.argmax((length < 1) | (computed < 0)))
        raise ValueError(
            f"request {i}: needs at least 1 new token and 0 computed ones, got {length[i]} and {computed[i]}."
        )

    rank, request, start, stop = _rows(length, computed, cp)
    order = np.lexsort((start, request, rank))
    rank, request, start, stop = rank[order], request[order], start[order], stop[order]
    row_len = stop - start
    row_first = np.cumsum(row_len) - row_len  # in the rank order, which the sorted rows are
    tokens = np.repeat(np.arange(len(row_len)), row_len)
    rank_start = np.concatenate([[0], np.cumsum(np.bincount(rank, weights=row_len, minlength=cp))]).astype(np.int64)
    arrays = {
        "rank_start": rank_start,
        "request": request[tokens],
        "offset": np.arange(len(tokens)) - row_first[tokens] + start[tokens],
        "row_rank": rank,
        "row_request": request,
        "row_len": row_len,
        "row_kv_len": computed[request] + stop,
    }
    return Plan(cp=cp, **{name: array.astype(np.int32) for name, array in arrays.items()})


def loads(
    num_new_tokens: Sequence[int] | np.ndarray, num_computed_tokens: Sequence[int] | np.ndarray, *, cp: int
) -> tuple[np.ndarray, np.ndarray]:
    """The load of each rank under `plan`, without the arrays of its tokens. Independent of the requests' order.

    Returns:
      int64 [cp], twice: `Plan.rank_tokens` and `Plan.rank_pairs`.
    """
    length, computed = np.asarray(num_new_tokens, np.int64), np.asarray(num_computed_tokens, np.int64)
    rank, request, start, stop = _rows(length, computed, cp)
    row_len = stop - start
    pairs = np.bincount(rank, weights=_pairs(row_len, computed[request] + stop), minlength=cp)
    return np.bincount(rank, weights=row_len, minlength=cp).astype(np.int64), pairs.astype(np.int64)


def _pairs(row_len: np.ndarray, row_kv_len: np.ndarray) -> np.ndarray:
    """Query-key pairs of rows: the last query sees all keys, each before it one less."""
    return row_len * row_kv_len - row_len * (row_len - 1) // 2


def _rows(length: np.ndarray, computed: np.ndarray, cp: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """(rank, request, start, stop) of every row, in no order: tokens [start, stop) of the request's new ones."""
    split = np.flatnonzero(length >= 2 * cp)
    whole = np.flatnonzero(length < 2 * cp)
    chunk = np.arange(2 * cp)
    owner = np.minimum(chunk, 2 * cp - 1 - chunk)
    cuts = np.arange(2 * cp + 1) * length[split, None] // (2 * cp)
    start, stop = cuts[:, :-1], cuts[:, 1:]
    ranks = np.broadcast_to(owner, start.shape)

    # Short requests, the most expensive first, go to the rank with the fewest tokens, then the fewest pairs: tokens set
    # the size of the step's buffer, which every rank pays for.
    count, end = stop - start, computed[split, None] + stop
    tokens = np.bincount(ranks.ravel(), weights=count.ravel(), minlength=cp)
    pairs = np.bincount(ranks.ravel(), weights=_pairs(count, end).ravel(), minlength=cp)
    heap = [(int(tokens[k]), int(pairs[k]), k) for k in range(cp)]
    heapq.heapify(heap)
    chosen = np.zeros(len(length), np.int64)
    order = whole[np.lexsort((-computed[whole], -length[whole]))] if cp > 1 else whole[:0]
    size = length[order]
    cost = _pairs(size, computed[order] + size)
    owners = []
    for more_tokens, more_pairs in zip(size.tolist(), cost.tolist(), strict=True):
        n, work, k = heap[0]
        owners.append(k)
        heapq.heapreplace(heap, (n + more_tokens, work + more_pairs, k))
    chosen[order] = owners

    return (
        np.concatenate([ranks.ravel(), chosen[whole]]),
        np.concatenate([np.repeat(split, 2 * cp), whole]),
        np.concatenate([start.ravel(), np.zeros(len(whole), np.int64)]),
        np.concatenate([stop.ravel(), length[whole]]),
    )
