"""A step's arrays: every token where it belongs, for any requests; and what is refused before a device could clamp it."""

from __future__ import annotations

import dataclasses
import doctest

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jax_mla_cp import mesh, planner
from jax_mla_cp.attention.form import use_expanded
from jax_mla_cp.batch import Batch, BatchShape, Sampling, StepShape, Work
from jax_mla_cp.cache import CacheShape
from jax_mla_cp.layout import Layout, build, check_works, lay_out
from jax_mla_cp.planner import _buckets
from jax_mla_cp.presets import model_config
from jax_mla_cp.zigzag import plan
from tests.synthetic import CONFIG

PAGE = 8


def shape(cp: int, requests: int, form: str = "auto", expanded_keys: int = 1664) -> BatchShape:
    return BatchShape(1, cp, -(-requests // cp) * cp, 16, expanded_keys, CacheShape(3, 200, PAGE), form)  # type: ignore[arg-type]


def fit(layout: Layout, at: BatchShape, spare: int = 0) -> StepShape:
    """Just large enough, and `spare` tokens more."""
    return StepShape(layout.tokens + spare, layout.absorbed_tokens, at.expanded_keys)


def make_works(requests: list[tuple[int, int]], seed: int = 0) -> list[Work]:
    rng = np.random.default_rng(seed)
    free = rng.permutation(200).tolist()
    works = []
    for new, cached in requests:
        pages = [free.pop() for _ in range(-(-(new + cached) // PAGE))]
        works.append(Work(rng.integers(0, CONFIG.vocab_size, new), cached, pages, Sampling(seed=len(works))))
    return works


requests = st.lists(st.tuples(st.integers(1, 60), st.integers(0, 40)), min_size=1, max_size=8)


@given(requests, st.integers(1, 9), st.sampled_from(["auto", "expanded", "absorbed"]))
@settings(deadline=None)
def test_every_token_is_in_its_place(requests: list[tuple[int, int]], cp: int, form: str) -> None:
    works, at = make_works(requests), shape(cp, len(requests), form)
    layout = lay_out(works, at, CONFIG)
    size = layout.tokens + 3
    batch = build([layout], at, fit(layout, at, spare=3))
    seen = set()
    for k in range(cp):
        mine = slice(k * size, (k + 1) * size)
        tokens, positions, slots = batch.tokens[mine], batch.positions[mine], batch.slots[mine]
        count = int(batch.num_tokens[k])
        assert (slots[count:] >= at.cache.total_slots).all(), "padding is written nowhere, in any layer"
        covered = 0
        for rows in (batch.expanded, batch.absorbed):
            many = 2 * at.requests
            cu_q = rows.cu_q[k * (many + 1) : (k + 1) * (many + 1)]
            assert (np.diff(cu_q) >= 0).all()
            for b in np.flatnonzero(np.diff(cu_q)):
                i = int(rows.request[k * many + b])
                kv_len = int(rows.kv_len[k * many + b])
                for j, t in enumerate(range(cu_q[b], cu_q[b + 1])):
                    position = kv_len - (cu_q[b + 1] - cu_q[b]) + j
                    assert positions[t] == position
                    assert tokens[t] == works[i].tokens[position - works[i].cached]
                    assert slots[t] == works[i].pages[position // PAGE] * PAGE + position % PAGE
                    assert rows is batch.expanded or t < layout.absorbed_tokens
                    seen.add((i, position))
                    covered += 1
                if rows is batch.expanded:  # the row's keys are its request's pages, in order
                    first = int(rows.kv_start[k * many + b]) // PAGE
                    used = -(-kv_len // PAGE)
                    assert batch.key_pages[first : first + used].tolist() == list(works[i].pages[:used])
        assert covered == count
    assert seen == {(i, cached + t) for i, (new, cached) in enumerate(requests) for t in range(new)}
    last = batch.last_index.reshape(cp, -1)
    for i, work in enumerate(works):
        (rank,) = np.flatnonzero(last[:, i] < size)
        assert batch.positions[rank * size + last[rank, i]] == work.cached + len(work.tokens) - 1
    assert (last[:, len(works) :] == size).all()


@given(requests, st.integers(1, 9))
@settings(deadline=None)
def test_packed_keys_share_no_tile(requests: list[tuple[int, int]], cp: int) -> None:
    """128 keys from any request's start belong to it or are gaps, which read as zeros."""
    works, at = make_works(requests), shape(cp, len(requests), "expanded")
    layout = lay_out(works, at, CONFIG)
    batch = build([layout], at, fit(layout, at))
    owner = {page: i for i, work in enumerate(works) for page in work.pages}
    rows = batch.expanded
    for b in np.flatnonzero(rows.kv_len):
        start, tiles = int(rows.kv_start[b]), -(-int(rows.kv_len[b]) // 128) * 128
        for page in batch.key_pages[start // PAGE : (start + tiles) // PAGE]:
            assert page >= at.cache.total_pages or owner[int(page)] == rows.request[b]


def test_fresh_pages_are_those_that_the_step_begins_and_does_not_fill() -> None:
    at = shape(2, 4)
    works = make_works([(9, 0), (8, 0), (3, 2), (1, 8)])  # begins page 1; fills page 0; goes on; begins page 1
    batch = build([lay_out(works, at, CONFIG)], at, StepShape(16, 16, at.expanded_keys))
    fresh = [int(page) for page in batch.fresh if page < at.cache.total_pages]
    assert fresh == [works[0].pages[1], works[3].pages[1]]


def test_sampling_goes_with_its_request() -> None:
    at = shape(2, 4)
    works = make_works([(1, 4), (30, 0), (2, 2)])
    works[2] = dataclasses.replace(works[2], sampling=None)
    batch: Batch = build([lay_out(works, at, CONFIG)], at, StepShape(32, 32, at.expanded_keys))
    assert batch.sampling.position.tolist() == [5, 30, 0, 0]
    assert batch.sampling.seed[:2, 0].tolist() == [0, 1]
    assert batch.sampling.temperature.tolist() == [1, 1, 0, 0]


@given(
    st.integers(1, 9), st.integers(1, 300), st.lists(st.integers(1, 120), min_size=1, max_size=20), st.integers(1, 40)
)
def test_the_largest_bucket_holds_any_step(cp: int, chunk: int, lengths: list[int], running: int) -> None:
    """Whatever the scheduler may put together: prompts of up to `chunk` tokens in all, and single tokens."""
    taken: list[int] = []
    for length in lengths[:running]:
        if (count := min(length, chunk - sum(taken))) > 0:
            taken.append(count)
    new = taken + [1] * (running - len(taken))
    assert plan(new, [0] * len(new), cp=cp).rank_tokens.max() <= _buckets(chunk, running, cp)[-1]


def test_doctest() -> None:
    assert doctest.testmod(planner).failed == 0
    assert doctest.testmod(mesh).failed == 0


def test_default_grids_are_small() -> None:
    for cp in (1, 2, 4, 8):
        for chunk, running in ((2048, 32), (8192, 64)):
            buckets = _buckets(chunk, running, cp)
            assert len(buckets) <= 24
            fine = [b * cp for b in buckets if b * cp > 4096]
            assert all(b <= a * 9 / 8 + cp for a, b in zip([4096, *fine], fine, strict=False))


def test_a_step_that_is_too_small_is_refused() -> None:
    """Two ranks with 12 tokens each of a long request, and a decoding request on one of them."""
    at = shape(2, 4, "expanded")
    layout = lay_out(make_works([(24, 0), (1, 30)]), at, CONFIG)
    assert (layout.tokens, layout.absorbed_tokens) == (13, 1)
    build([layout], at, StepShape(13, 1, 128))
    for step, message in (
        (StepShape(12, 1, 128), "a rank has 13 tokens, the step has room for 12"),
        (StepShape(13, 0, 128), "a rank has 1 tokens of absorbed rows, the step has room for 0"),
        (StepShape(13, 1, 0), "a rank has 128 expanded keys, the step has room for 0"),
    ):
        with pytest.raises(ValueError, match=message):
            build([layout], at, step)


GOOD = Work([1, 2, 3], 6, [4, 5])


@pytest.mark.parametrize(
    ("works", "message"),
    [
        ([dataclasses.replace(GOOD, tokens=[])], "at least 1 token"),
        ([dataclasses.replace(GOOD, tokens=[1, 250, 3])], "token id 250 is not in the vocabulary"),
        ([dataclasses.replace(GOOD, tokens=[1, -1, 3])], "token id -1"),
        ([dataclasses.replace(GOOD, tokens=[0.5, 1.0])], "must be a list of token ids"),
        ([dataclasses.replace(GOOD, cached=-1)], "cached >= 0"),
        ([dataclasses.replace(GOOD, pages=[4])], "need 2 pages of 8, got 1"),
        ([dataclasses.replace(GOOD, pages=[4, 200])], "page ids must be 0 to 199"),
        ([dataclasses.replace(GOOD, pages=[-1, 4])], "page ids must be 0 to 199"),
        ([dataclasses.replace(GOOD, pages=[4, 4])], "a page is listed twice"),
        ([GOOD, GOOD], "also written by work 0"),
        ([dataclasses.replace(GOOD, cached=126, pages=range(17))], "the page table holds 16"),
        ([dataclasses.replace(GOOD, cached=510, pages=range(65))], "exceed the model's 512 positions"),
        ([dataclasses.replace(GOOD, embeds=np.zeros((2, 64)))], r"embeds must be \[3, 64\]"),
        ([dataclasses.replace(GOOD, pages=[2 * i, 2 * i + 1]) for i in range(9)], "at most 8 requests"),
    ],
)
def test_refuses(works: list[Work], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_works(works, shape(2, 8), CONFIG)


def test_form_follows_the_arithmetic() -> None:
    """The crossovers of DeepSeek-V3's shape: near 209 queries a rank against a long prefix, near 418 cp - 297 without."""
    v3 = model_config("deepseek_v3")
    for cp in (1, 4, 8):
        assert not use_expanded("auto", v3, cp, 100 * cp, 100_000)
        assert use_expanded("auto", v3, cp, 260 * cp, 100_000)
    assert not use_expanded("auto", v3, 4, 600, 0)
    assert use_expanded("auto", v3, 4, 1500, 0)
    assert not use_expanded("expanded", v3, 1, 1, 50)
