"""The zigzag plan's promises, for any requests and any cp."""

from __future__ import annotations

import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jax_mla_cp.batch import zigzag
from jax_mla_cp.batch.zigzag import Plan, plan

requests = st.lists(st.tuples(st.integers(1, 70), st.integers(0, 50)), min_size=1, max_size=9)
cps = st.integers(1, 9)


def make(requests: list[tuple[int, int]], cp: int) -> Plan:
    return plan([new for new, _ in requests], [prefix for _, prefix in requests], cp=cp)


def owner(length: int, offset: int, cp: int) -> int:
    """The rank of a token, told from the definition: by its chunk."""
    chunk = next(j for j in range(2 * cp) if j * length // (2 * cp) <= offset < (j + 1) * length // (2 * cp))
    return min(chunk, 2 * cp - 1 - chunk)


def visible(p: Plan, prefixes: list[int]) -> dict[tuple[int, int], int]:
    """(request, position) -> keys that the rows let it see."""
    seen = {}
    for k in range(p.cp):
        at = int(p.rank_start[k])
        for b in np.flatnonzero(p.row_rank == k):
            for j in range(p.row_len[b]):
                i = int(p.request[at])
                assert i == p.row_request[b]
                key = (i, prefixes[i] + int(p.offset[at]))
                assert key not in seen
                seen[key] = int(p.row_kv_len[b] - p.row_len[b] + 1 + j)
                at += 1
        assert at == p.rank_start[k + 1], "a rank's rows cover its tokens without gaps"
    return seen


@given(requests, cps)
def test_every_token_once_on_its_rank(requests: list[tuple[int, int]], cp: int) -> None:
    p = make(requests, cp)
    rank = np.repeat(np.arange(cp), p.rank_tokens)
    tokens = list(zip(p.request.tolist(), p.offset.tolist(), strict=True))
    assert sorted(tokens) == [(i, t) for i, (new, _) in enumerate(requests) for t in range(new)]
    for (i, t), k in zip(tokens, rank, strict=True):
        if requests[i][0] >= 2 * cp:
            assert k == owner(requests[i][0], t, cp)
        else:
            assert p.row_rank[p.row_request == i].tolist() == [k], "a short request is on one rank, one row"


@given(requests, cps)
def test_rows_are_the_causal_mask(requests: list[tuple[int, int]], cp: int) -> None:
    """The rows' bottom-right aligned masks together are exactly causal attention, nothing seen twice or missed."""
    prefixes = [prefix for _, prefix in requests]
    seen = visible(make(requests, cp), prefixes)
    brute = {(i, prefix + t): prefix + t + 1 for i, (new, prefix) in enumerate(requests) for t in range(new)}
    assert seen == brute


def test_the_mask_check_notices_a_wrong_plan() -> None:
    """Negative control of the test above: one key more in one row."""
    p = plan([8, 3], [0, 5], cp=2)
    p.row_kv_len[1] += 1
    brute = {(0, t): t + 1 for t in range(8)} | {(1, 5 + t): 6 + t for t in range(3)}
    assert visible(p, [0, 5]) != brute


@given(st.integers(1, 9).flatmap(lambda cp: st.tuples(st.just(cp), st.integers(2 * cp, 5000), st.integers(0, 5000))))
def test_balance(case: tuple[int, int, int]) -> None:
    cp, new, prefix = case
    p = plan([new], [prefix], cp=cp)
    assert np.ptp(p.rank_tokens) <= 2
    assert np.ptp(p.rank_pairs()) <= 2 * (prefix + new)
    assert p.rank_pairs().sum() == new * prefix + new * (new + 1) // 2


@given(st.lists(st.integers(0, 4000), min_size=1, max_size=200), cps)
def test_decode_tokens_spread_evenly(prefixes: list[int], cp: int) -> None:
    p = plan([1] * len(prefixes), prefixes, cp=cp)
    assert np.ptp(p.rank_tokens) <= (1 if cp > 1 else 0)
    # The most expensive first to the least loaded: no rank exceeds the mean by more than one request.
    assert p.rank_pairs().max() - p.rank_pairs().sum() / cp <= max(prefixes) + 1


def test_no_requests() -> None:
    p = plan([], [], cp=3)
    assert p.rank_tokens.tolist() == [0, 0, 0] and len(p.row_len) == 0


@pytest.mark.parametrize(
    ("new", "prefix", "cp", "message"),
    [
        ([4], [0], 0, "cp must be at least 1"),
        ([4, 0], [0, 0], 2, "request 1: needs at least 1 new token"),
        ([4], [-1], 2, "request 0"),
        ([4, 4], [0], 2, "equally long"),
    ],
)
def test_refuses(new: list[int], prefix: list[int], cp: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plan(new, prefix, cp=cp)


@given(requests, cps, st.randoms())
def test_loads_are_the_plans_in_any_order(requests: list[tuple[int, int]], cp: int, random: random.Random) -> None:
    """So a step's bucket is known before its requests' forms, which put them into another order."""
    p = make(requests, cp)
    shuffled = random.sample(requests, len(requests))
    tokens, pairs = zigzag.loads(*np.array(shuffled).T, cp=cp)
    assert tokens.tolist() == p.rank_tokens.tolist() and pairs.tolist() == p.rank_pairs().tolist()
