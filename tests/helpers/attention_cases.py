"""Calls of the three targets and what they must return: for the CPU handlers (tests/ffi) and the kernels (tests/gpu).

Everything that a call must not read is filled with NaN or with ids out of range.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import ml_dtypes
import numpy as np

from jax_mla_cp.attention import fa3
from jax_mla_cp.batch.rows import Rows
from jax_mla_cp.batch.zigzag import Plan

LATENT, ROPE, QUERY, VALUE = 512, 64, 192, 128
KEY_TILE = 128  # of the expanded kernel; the absorbed ones' is fa3.PAGE_MULTIPLE
BF16 = ml_dtypes.bfloat16
ERROR = 4e-3
"""Relative error norm of a bfloat16 result: its rounding makes 1.7e-3, that of the probabilities before the sum 1.1e-3."""
EACH = 1.2e-2
"""The same for each token and head by itself. A key too few among 1000 makes 3e-2."""

TARGETS: dict[str, Callable[..., Any]] = {
    "mla_prefill_expanded": jax.jit(fa3.mla_prefill_expanded, static_argnames="scale"),
    "mla_prefill_absorbed": jax.jit(fa3.mla_prefill_absorbed, static_argnames="scale"),
    "mla_decode": jax.jit(fa3.mla_decode, static_argnames="scale"),
}
ABSORBED = ("mla_prefill_absorbed", "mla_decode")


class Row(NamedTuple):
    """`queries` last tokens of the first `keys` ones of a request."""

    queries: int
    keys: int
    request: int


RAGGED = (
    Row(17, 17, 0),
    Row(0, 5, 1),
    Row(1, 200, 2),
    Row(3, 3, 3),
    Row(0, 0, 1),
    Row(5, 70, 4),
    Row(4, 150, 5),
    Row(6, 170, 5),
    Row(1, 1, 6),
    Row(9, 64, 7),
    Row(2, 128, 8),
    Row(2, 193, 9),
)
"""A whole request, empty rows, decode tokens, prefixes, two rows that share keys, lengths at and beside a tile's edge."""


@dataclasses.dataclass(frozen=True)
class Case:
    """A call's operands, and in float64 what it returns."""

    operands: tuple[np.ndarray, ...]
    rows: Rows
    scale: float
    out: np.ndarray  # [T, n, v]
    lse: np.ndarray  # [n, T]

    def run(self, target: str) -> tuple[np.ndarray, np.ndarray]:
        """The output token by token, and the log-sum-exp."""
        out, lse = TARGETS[target](*self.operands, self.rows, scale=self.scale)
        return by_token(target, np.asarray(out)), np.asarray(lse)

    def check(self, target: str) -> None:
        check(*self.run(target), self.out, self.lse)


def by_token(target: str, out: Any) -> Any:
    return out.swapaxes(0, 1) if target in ABSORBED else out


def check(out: np.ndarray, lse: np.ndarray, want: np.ndarray, want_lse: np.ndarray) -> None:
    mine = np.isfinite(want_lse[0])
    assert out.dtype == BF16 and lse.dtype == np.float32
    assert not out[~mine].any(), "tokens of no row must be zero"
    assert (lse[:, ~mine] == -np.inf).all()
    if mine.any():
        error = np.linalg.norm(out[mine].astype(np.float64) - want[mine], axis=-1)
        size = np.linalg.norm(want[mine], axis=-1)
        assert np.linalg.norm(error) < ERROR * np.linalg.norm(size)
        assert (error < EACH * size).all(), f"worst: {(error / size).max()}"
        np.testing.assert_allclose(lse[:, mine], want_lse[:, mine], atol=1e-3, rtol=0)


def brute_force(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, visible: np.ndarray, scale: float
) -> tuple[np.ndarray, np.ndarray]:
    """Query i sees the first `visible[i]` keys. [L, n, d], [S, n, d], [S, n, v] -> [L, n, v], [n, L] in float64.

    Keys and values without a head dimension are all heads'.
    """
    q, k, v = (x.astype(np.float64) for x in (q, k, v))
    shared = k.ndim == 2
    s = np.tensordot(q, k, (2, 1)).swapaxes(0, 1) if shared else q.swapaxes(0, 1) @ k.transpose(1, 2, 0)
    s *= scale
    s[:, np.arange(len(k)) >= visible[:, None]] = -np.inf
    best = s.max(-1, keepdims=True)
    p = np.exp(s - best)
    total = p.sum(-1, keepdims=True)
    p /= total
    out = np.tensordot(p, v, (2, 0)) if shared else p @ v.swapaxes(0, 1)
    return out.swapaxes(0, 1), (best + np.log(total))[..., 0]


def expanded(
    rows: Sequence[Row],
    heads: int,
    *,
    align: int = KEY_TILE,
    fill: float = np.nan,
    poison: Sequence[int] = (),
    seed: int = 0,
) -> Case:
    """Keys of a request begin at a multiple of `align`, with zeros to the end of its last tile and a tile of `fill` behind.

    With another `align` than a tile, requests follow each other closely. `poison` are requests whose keys are NaN.
    """
    rng = np.random.default_rng(seed)
    keys = _keys(rows)
    parts, starts, at = [], [], 0
    for request, count in enumerate(keys):
        made = rng.normal(size=(count, heads, QUERY + VALUE))
        last = request + 1 == len(keys)  # the array ends where its keys do
        zeros = 0 if last else -count % align
        free = KEY_TILE if align == KEY_TILE and not last else 0
        starts.append(at)
        parts.append(np.full_like(made, np.nan) if request in poison else made)
        parts += [np.full((rest, heads, QUERY + VALUE), value) for rest, value in ((zeros, 0), (free, fill))]
        at += count + zeros + free
    kv = np.concatenate(parts).astype(BF16)
    q = _queries(rng, rows, heads, QUERY, fill)
    call = _rows(rows, [starts[row.request] for row in rows])
    out, lse = _expected(
        rows, q, VALUE, QUERY**-0.5, lambda row: np.split(kv[starts[row.request] :][: row.keys], [QUERY], 2)
    )
    return Case((q, kv), call, QUERY**-0.5, out, lse)


def absorbed(
    rows: Sequence[Row],
    heads: int,
    page_size: int,
    *,
    fill: float = np.nan,
    poison: Sequence[int] = (),
    seed: int = 0,
    spare: int = 3,
) -> Case:
    """Pages of a request lie in any order; `spare` free ones, and slots past the tile with a request's end, hold `fill`."""
    rng = np.random.default_rng(seed)
    keys = _keys(rows)
    used = [-(-count // page_size) for count in keys]
    ids = np.split(rng.permutation(sum(used) + spare), np.cumsum(used))
    pages = np.full((sum(used) + spare, page_size, LATENT + ROPE), fill, np.float32)
    latents = []
    for request, count in enumerate(keys):
        written = -(-count // fa3.PAGE_MULTIPLE) * fa3.PAGE_MULTIPLE
        tail = np.full((used[request] * page_size - written, LATENT + ROPE), fill)
        made = rng.normal(size=(count, LATENT + ROPE))
        latents.append((np.full_like(made, np.nan) if request in poison else made).astype(BF16))
        whole = np.concatenate([latents[-1], np.zeros((written - count, LATENT + ROPE)), tail])
        pages[ids[request]] = whole.reshape(-1, page_size, LATENT + ROPE)
    table = np.empty((len(rows), max(used) + 2), np.int32)
    table[:] = [len(pages) + 99, -1, np.iinfo(np.int32).max, len(pages)][seed % 4]  # past a row's keys: out of range
    for b, row in enumerate(rows):
        mine = ids[row.request][: -(-row.keys // page_size)]
        table[b, : len(mine)] = mine
    q = _queries(rng, rows, heads, LATENT + ROPE, fill)
    scale = (LATENT + ROPE) ** -0.5
    out, lse = _expected(
        rows,
        q,
        LATENT,
        scale,
        lambda row: (latents[row.request][: row.keys], latents[row.request][: row.keys, :LATENT]),
    )
    latent = np.ascontiguousarray(q[..., :LATENT].swapaxes(0, 1))
    operands = (latent, np.ascontiguousarray(q[..., LATENT:]), pages.astype(BF16), table)
    return Case(operands, _rows(rows, [0] * len(rows)), scale, out, lse)


BEFORE, _AFTER = 3, 5  # tokens of no row


def _keys(rows: Sequence[Row]) -> list[int]:
    """Keys that each request's longest row sees."""
    return [max(row.keys for row in rows if row.request == i) for i in range(max(row.request for row in rows) + 1)]


def _queries(rng: np.random.Generator, rows: Sequence[Row], heads: int, dim: int, fill: float) -> np.ndarray:
    tokens = BEFORE + sum(row.queries for row in rows) + _AFTER
    q = rng.normal(size=(tokens, heads, dim))
    q[:BEFORE], q[tokens - _AFTER :] = fill, fill
    return q.astype(BF16)


def _rows(rows: Sequence[Row], kv_start: Sequence[int]) -> Rows:
    cu_q = BEFORE + np.cumsum([0, *(row.queries for row in rows)])
    arrays = (cu_q, [row.keys for row in rows], kv_start, [row.request for row in rows])
    return Rows(*(np.asarray(x, np.int32) for x in arrays))


def _expected(
    rows: Sequence[Row], q: np.ndarray, dim: int, scale: float, keys: Callable[[Row], Sequence[np.ndarray]]
) -> tuple[np.ndarray, np.ndarray]:
    out, lse = np.zeros((*q.shape[:2], dim)), np.full(q.shape[1::-1], -np.inf)
    at = BEFORE
    for row in rows:
        if row.queries:
            mine = slice(at, at + row.queries)
            visible = row.keys - row.queries + 1 + np.arange(row.queries)
            out[mine], lse[:, mine] = brute_force(q[mine], *keys(row), visible, scale)
        at += row.queries
    return out, lse


def rank_calls(plan: Plan, kv_start: Sequence[int]) -> list[tuple[np.ndarray, int, Rows]]:
    """For each rank of a plan: its tokens, as places in the sequence order, how many they are, and its rows.

    All ranks get arrays of one size, with token 0 and empty rows behind the real ones, to share a program.
    """
    length = np.bincount(plan.request)
    place = (np.cumsum(length) - length)[plan.request] + plan.offset
    tokens, batch = plan.rank_tokens.max(), np.bincount(plan.row_rank).max()
    calls = []
    for rank in range(plan.cp):
        index = place[plan.rank_start[rank] : plan.rank_start[rank + 1]]
        mine = plan.row_rank == rank
        pad = (0, batch - mine.sum())
        request = np.pad(plan.row_request[mine], pad)
        cu_q = np.pad(np.cumsum([0, *plan.row_len[mine]]), pad, mode="edge")
        arrays = (cu_q, np.pad(plan.row_kv_len[mine], pad), np.asarray(kv_start)[request], request)
        rows = Rows(*(np.asarray(x, np.int32) for x in arrays))
        calls.append((np.pad(index, (0, tokens - len(index))), len(index), rows))
    return calls


def moves(text: str, *shapes: tuple[int, ...]) -> list[str]:
    """Copies and transposes, in a compiled program's text, of arrays as large as one of `shapes`."""
    sizes = {math.prod(shape) for shape in shapes}
    found = re.finditer(r"= \(?\w+\[([\d,]+)\][^=\n]*? (?:copy|copy-start|transpose)\(.*", text)
    return [match[0][:160] for match in found if math.prod(map(int, match[1].split(","))) in sizes]


TWO = (Row(5, 70, 0), Row(3, 90, 1))
"""Rows of two requests, each with a prefix."""


def make(target: str, rows: tuple[Row, ...] = TWO, heads: int = 2, **options: Any) -> Case:
    """A case for a target, in the form that it takes."""
    return absorbed(rows, heads, 64, **options) if target in ABSORBED else expanded(rows, heads, **options)
