"""A step's arrays: every token where it belongs, for any requests; and what is refused before a device could clamp it."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jax_mla_cp.batch.arrays import Batch
from jax_mla_cp.batch.check import check_requests
from jax_mla_cp.batch.columns import RequestColumns
from jax_mla_cp.batch.form import use_expanded
from jax_mla_cp.batch.layout import GroupLayout, build_batch, lay_out
from jax_mla_cp.batch.shapes import BatchShape, CacheShape, StepShape
from jax_mla_cp.batch.step_request import SamplingParams, StepRequest
from jax_mla_cp.batch.zigzag import plan
from jax_mla_cp.config.presets import model_config
from jax_mla_cp.step.planner import _buckets
from tests.helpers.synthetic import CONFIG, step_layout

PAGE = 8


def shape(cp: int, lengths: int, form: str = "auto", expanded_keys: int = 1664, drafts: int = 0) -> BatchShape:
    return BatchShape(1, cp, -(-lengths // cp) * cp, 16, expanded_keys, CacheShape(3, 200, PAGE), form, drafts)  # type: ignore[arg-type]


def fit(layout: GroupLayout, at: BatchShape, spare: int = 0) -> StepShape:
    """Just large enough, and `spare` tokens more."""
    return StepShape(layout.max_tokens + spare, layout.absorbed_tokens, at.expanded_keys)


def make_requests(lengths: list[tuple[int, int]], seed: int = 0) -> list[StepRequest]:
    rng = np.random.default_rng(seed)
    free = rng.permutation(200).tolist()
    requests = []
    for new, cached in lengths:
        pages = [free.pop() for _ in range(-(-(new + cached) // PAGE))]
        requests.append(
            StepRequest(rng.integers(0, CONFIG.vocab_size, new), cached, pages, SamplingParams(seed=len(requests)))
        )
    return requests


lengths = st.lists(st.tuples(st.integers(1, 60), st.integers(0, 40)), min_size=1, max_size=8)


@given(lengths, st.integers(1, 9), st.sampled_from(["auto", "expanded", "absorbed"]))
@settings(deadline=None)
def test_every_token_is_in_its_place(lengths: list[tuple[int, int]], cp: int, form: str) -> None:
    requests, at = make_requests(lengths), shape(cp, len(lengths), form)
    layout = lay_out(RequestColumns.of(requests, at), at, CONFIG)
    size = layout.max_tokens + 3
    batch = build_batch(step_layout([layout], fit(layout, at, spare=3)), at)
    seen = set()
    for k in range(cp):
        mine = slice(k * size, (k + 1) * size)
        tokens, positions, slots = batch.tokens[mine], batch.positions[mine], batch.slot_mapping[mine]
        count = int(batch.num_tokens[k])
        assert (slots[count:] >= at.cache.total_slots).all(), "padding is written nowhere, in any layer"
        covered = 0
        for rows in (batch.expanded, batch.absorbed):
            many = 2 * at.max_requests
            cu_q = rows.cu_q[k * (many + 1) : (k + 1) * (many + 1)]
            assert (np.diff(cu_q) >= 0).all()
            for b in np.flatnonzero(np.diff(cu_q)):
                i = int(rows.request[k * many + b])
                kv_len = int(rows.kv_len[k * many + b])
                for j, t in enumerate(range(cu_q[b], cu_q[b + 1])):
                    position = kv_len - (cu_q[b + 1] - cu_q[b]) + j
                    assert positions[t] == position
                    assert tokens[t] == requests[i].tokens[position - requests[i].num_computed_tokens]
                    assert slots[t] == requests[i].pages[position // PAGE] * PAGE + position % PAGE
                    assert rows is batch.expanded or t < layout.absorbed_tokens
                    seen.add((i, position))
                    covered += 1
                if rows is batch.expanded:  # the row's keys are its request's pages, in order
                    first = int(rows.kv_start[k * many + b]) // PAGE
                    used = -(-kv_len // PAGE)
                    assert batch.key_pages[first : first + used].tolist() == list(requests[i].pages[:used])
        assert covered == count
    assert seen == {(i, cached + t) for i, (new, cached) in enumerate(lengths) for t in range(new)}
    last = batch.last_index.reshape(cp, -1)
    for i, request in enumerate(requests):
        (rank,) = np.flatnonzero(last[:, i] < size)
        assert batch.positions[rank * size + last[rank, i]] == request.num_computed_tokens + len(request.tokens) - 1
    assert (last[:, len(requests) :] == size).all()


@given(lengths, st.integers(1, 9))
@settings(deadline=None)
def test_packed_keys_share_no_tile(lengths: list[tuple[int, int]], cp: int) -> None:
    """128 keys from any request's start belong to it or are gaps, which read as zeros."""
    requests, at = make_requests(lengths), shape(cp, len(lengths), "expanded")
    layout = lay_out(RequestColumns.of(requests, at), at, CONFIG)
    batch = build_batch(step_layout([layout], fit(layout, at)), at)
    owner = {page: i for i, request in enumerate(requests) for page in request.pages}
    rows = batch.expanded
    for b in np.flatnonzero(rows.kv_len):
        start, tiles = int(rows.kv_start[b]), -(-int(rows.kv_len[b]) // 128) * 128
        for page in batch.key_pages[start // PAGE : (start + tiles) // PAGE]:
            assert page >= at.cache.total_pages or owner[int(page)] == rows.request[b]


def test_pages_to_zero_are_those_that_the_step_begins_and_does_not_fill() -> None:
    at = shape(2, 4)
    requests = make_requests([(9, 0), (8, 0), (3, 2), (1, 8)])  # begins page 1; fills page 0; goes on; begins page 1
    batch = build_batch(
        step_layout([lay_out(RequestColumns.of(requests, at), at, CONFIG)], StepShape(16, 16, at.expanded_keys)), at
    )
    to_zero = [int(page) for page in batch.pages_to_zero if page < at.cache.total_pages]
    assert to_zero == [requests[0].pages[1], requests[3].pages[1]]


def test_sampling_goes_with_its_request() -> None:
    at = shape(2, 4)
    requests = make_requests([(1, 4), (30, 0), (2, 2)])
    requests[2] = dataclasses.replace(requests[2], sampling=None)
    batch: Batch = build_batch(
        step_layout([lay_out(RequestColumns.of(requests, at), at, CONFIG)], StepShape(32, 32, at.expanded_keys)), at
    )
    assert batch.sampling.position.tolist() == [5, 30, 0, 0]
    assert batch.sampling.seed[:2, 0].tolist() == [0, 1]
    assert batch.sampling.temperature.tolist() == [1, 1, 0, 0]


@st.composite
def speculating(draw: st.DrawFn) -> tuple[list[StepRequest], int]:
    """Prompts' chunks and ends, decoding requests with drafts, and how many drafts there may be."""
    most = draw(st.integers(1, 4))
    requests = []
    for request in make_requests(draw(lengths)):
        drafts = draw(st.integers(0, min(most, len(request.tokens) - 1)))
        follows = draw(st.one_of(st.none(), st.integers(0, CONFIG.vocab_size - 1)))
        if draw(st.booleans()):
            requests.append(dataclasses.replace(request, drafts=drafts))
        else:
            requests.append(dataclasses.replace(request, sampling=None, next_token=follows))
    return requests, most


@given(speculating(), st.integers(1, 5))
@settings(deadline=None)
def test_every_token_goes_with_its_next_one(case: tuple[list[StepRequest], int], cp: int) -> None:
    """Next tokens are permuted like the tokens; what is sampled after is where the plan put it."""
    requests, most = case
    at = shape(cp, len(requests), drafts=most)
    check_requests(RequestColumns.of(requests, at), at, CONFIG)
    layout = lay_out(RequestColumns.of(requests, at), at, CONFIG)
    size = layout.max_tokens + 2
    batch = build_batch(step_layout([layout], fit(layout, at, spare=2)), at)
    owner = {page: i for i, request in enumerate(requests) for page in request.pages}
    seen = 0
    for k in range(cp):
        for t in range(k * size, k * size + int(batch.num_tokens[k])):
            request = requests[owner[int(batch.slot_mapping[t]) // PAGE]]
            offset = int(batch.positions[t]) - request.num_computed_tokens
            known = len(request.tokens) - 1 - request.drafts
            end = -1 if request.next_token is None else request.next_token
            assert batch.next_tokens[t] == (request.tokens[offset + 1] if offset < known else end)
            seen += 1
    assert seen == sum(len(request.tokens) for request in requests)
    last = batch.last_index.reshape(cp, -1, 1 + most)
    sampling = {name: value.reshape(-1, 1 + most, *value.shape[1:]) for name, value in vars(batch.sampling).items()}
    assert batch.speculation is not None
    for i, request in enumerate(requests):
        first = request.num_computed_tokens + len(request.tokens) - 1 - request.drafts
        assert batch.speculation.first_position[i] == first
        guesses = [*request.tokens[len(request.tokens) - request.drafts :], *[-1] * (most - request.drafts)]
        assert batch.speculation.drafts[i].tolist() == guesses
        for j in range(1 + most):
            (ranks,) = np.nonzero(last[:, i, j] < size)
            assert len(ranks) == (j <= request.drafts)
            for rank in ranks:
                assert batch.positions[rank * size + last[rank, i, j]] == first + j
            drawn = request.sampling is not None and j <= request.drafts
            assert sampling["position"][i, j] == (first + j + 1 if drawn else 0)
            assert sampling["temperature"][i, j] == drawn
            assert sampling["seed"][i, j, 0] == (i if drawn else 0)


def test_recycled_drafts_may_be_written_as_far_as_the_request_has_pages() -> None:
    """Pages that they begin are zeroed with the step's own."""
    at = shape(1, 4, drafts=4)
    requests = make_requests([(3, 4), (1, 7), (2, 13), (8, 0)])
    requests = [dataclasses.replace(request, pages=[*request.pages, 150 + i]) for i, request in enumerate(requests)]
    requests[2] = dataclasses.replace(requests[2], pages=requests[2].pages[:2])
    requests[3] = dataclasses.replace(requests[3], sampling=None, next_token=5)
    check_requests(RequestColumns.of(requests, at), at, CONFIG)
    batch = build_batch(
        step_layout([lay_out(RequestColumns.of(requests, at), at, CONFIG)], StepShape(32, 32, at.expanded_keys)), at
    )
    assert batch.speculation is not None
    assert batch.speculation.writable_end.tolist() == [10, 11, 16, 8]
    to_zero = [int(page) for page in batch.pages_to_zero if page < at.cache.total_pages]
    assert to_zero == [150, 151]
    reached = [[int(page) for page in row if page < at.cache.total_pages] for row in batch.page_table]
    assert reached == [
        list(requests[0].pages),
        list(requests[1].pages),
        list(requests[2].pages),
        list(requests[3].pages[:1]),
    ]


@given(
    st.integers(1, 9),
    st.integers(1, 300),
    st.lists(st.integers(1, 120), min_size=1, max_size=20),
    st.integers(1, 40),
    st.integers(1, 5),
)
def test_the_largest_bucket_holds_any_step(cp: int, chunk: int, lengths: list[int], running: int, decoded: int) -> None:
    """Whatever the scheduler may put together: prompts of up to `chunk` tokens in all, and decoding requests."""
    taken: list[int] = []
    for length in lengths[:running]:
        if (count := min(length, chunk - sum(taken))) > 0:
            taken.append(count)
    new = taken + [decoded] * (running - len(taken))
    assert plan(new, [0] * len(new), cp=cp).rank_tokens.max() <= _buckets(chunk, running, cp, decoded)[-1]


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
    layout = lay_out(RequestColumns.of(make_requests([(24, 0), (1, 30)]), at), at, CONFIG)
    assert (layout.max_tokens, layout.absorbed_tokens) == (13, 1)
    build_batch(step_layout([layout], StepShape(13, 1, 128)), at)
    for step, message in (
        (StepShape(12, 1, 128), "a rank has 13 tokens, the step has room for 12"),
        (StepShape(13, 0, 128), "a rank has 1 tokens of absorbed rows, the step has room for 0"),
        (StepShape(13, 1, 0), "a rank has 128 expanded keys, the step has room for 0"),
    ):
        with pytest.raises(ValueError, match=message):
            build_batch(step_layout([layout], step), at)


GOOD = StepRequest([1, 2, 3], 6, [4, 5])


@pytest.mark.parametrize(
    ("requests", "message"),
    [
        ([dataclasses.replace(GOOD, tokens=[])], "at least 1 token"),
        ([dataclasses.replace(GOOD, tokens=[1, 250, 3])], "token id 250 is not in the vocabulary"),
        ([dataclasses.replace(GOOD, tokens=[1, -1, 3])], "token id -1"),
        ([dataclasses.replace(GOOD, tokens=[0.5, 1.0])], "must be a list of token ids"),
        (
            [GOOD, dataclasses.replace(GOOD, tokens=[2**70, 1])],
            r"request 1: .* must be a list of token ids, got object",
        ),
        ([dataclasses.replace(GOOD, tokens=np.zeros((3, 1), int))], r"list of token ids, got int64 of shape \(3, 1\)"),
        ([dataclasses.replace(GOOD, pages=[4, 5.5])], "pages must be a list of page ids, got float64"),
        ([dataclasses.replace(GOOD, num_computed_tokens=-1)], "num_computed_tokens must be at least 0"),
        ([dataclasses.replace(GOOD, pages=[4])], "need 2 pages of 8, got 1"),
        ([dataclasses.replace(GOOD, pages=[4, 200])], "page ids must be 0 to 199"),
        ([dataclasses.replace(GOOD, pages=[-1, 4])], "page ids must be 0 to 199"),
        ([dataclasses.replace(GOOD, pages=[4, 4])], "a page is listed twice"),
        ([GOOD, GOOD], "also written by request 0"),
        ([dataclasses.replace(GOOD, num_computed_tokens=126, pages=range(17))], "the page table holds 16"),
        ([dataclasses.replace(GOOD, num_computed_tokens=510, pages=range(65))], "exceed the model's 512 positions"),
        ([dataclasses.replace(GOOD, embeds=np.zeros((2, 64)))], r"embeds must be \[3, 64\]"),
        ([dataclasses.replace(GOOD, drafts=3, sampling=SamplingParams())], "drafts must be 0 to 2 .* got 3"),
        ([dataclasses.replace(GOOD, drafts=1)], "drafts are verified by sampling"),
        ([dataclasses.replace(GOOD, next_token=1, sampling=SamplingParams())], "next_token is for tokens after which"),
        ([dataclasses.replace(GOOD, next_token=250)], "token id 250"),
        ([dataclasses.replace(GOOD, embeds=np.zeros((3, 64)))], "embeds can't be combined with draft_tokens"),
        (
            [
                dataclasses.replace(GOOD, sampling=SamplingParams(), pages=[4, 5, 6]),
                dataclasses.replace(GOOD, num_computed_tokens=1, pages=[6]),
            ],
            "page 6 is also written by request 0",
        ),
        ([dataclasses.replace(GOOD, pages=[2 * i, 2 * i + 1]) for i in range(9)], "at most 8 requests"),
    ],
)
def test_refuses(requests: list[StepRequest], message: str) -> None:
    at = shape(2, 8, drafts=12)
    with pytest.raises(ValueError, match=message):
        check_requests(RequestColumns.of(requests, at), at, CONFIG)


def test_form_follows_the_arithmetic() -> None:
    """The crossovers of DeepSeek-V3's shape: near 209 queries a rank against a long prefix, near 418 cp - 297 without."""
    v3 = model_config("deepseek_v3")
    for cp in (1, 4, 8):
        assert not use_expanded("auto", v3, cp, 100 * cp, 100_000)
        assert use_expanded("auto", v3, cp, 260 * cp, 100_000)
    assert not use_expanded("auto", v3, 4, 600, 0)
    assert use_expanded("auto", v3, 4, 1500, 0)
    assert not use_expanded("expanded", v3, 1, 1, 50)
