"""The page table on the devices: after any steps it holds what each request needs, and its checksum is the mirror's."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jax_mla_cp import cache
from jax_mla_cp.batch.arrays import Batch, TableChanges
from jax_mla_cp.batch.check import check_requests
from jax_mla_cp.batch.columns import RequestColumns
from jax_mla_cp.batch.layout import build_batch, lay_out
from jax_mla_cp.batch.page_table import TableMirror, TableUpdate, apply_changes, checksum, device_checksum
from jax_mla_cp.batch.rows import Rows
from jax_mla_cp.batch.shapes import BatchShape, CacheShape, StepShape
from jax_mla_cp.batch.step_request import SamplingParams, StepRequest
from tests.helpers.synthetic import CONFIG, step_layout

PAGE, PAGES, RUNNING, WIDTH = 8, 40, 6, 7
TOKENS = 12
STEP = StepShape(TOKENS, TOKENS, 0)


def shape(dp: int = 1, cp: int = 2, drafts: int = 0) -> BatchShape:
    return BatchShape(dp, cp, RUNNING, WIDTH, 0, CacheShape(3, PAGES, PAGE), "absorbed", drafts)


@jax.jit
def on_device(table: jax.Array, changes: TableChanges) -> tuple[jax.Array, jax.Array]:
    """A device's part: the changed table, and its checksum."""
    table = apply_changes(table, changes)
    return table, device_checksum(table)


class Devices:
    """The tables of all dp groups, as one device of each has them."""

    def __init__(self, at: BatchShape):
        self.mirror = TableMirror(at)
        self.tables = np.split(self.mirror.whole, at.dp)

    def run(self, columns: Sequence[RequestColumns]) -> TableUpdate:
        """A step: what is sent before it, then its changes."""
        update = self.mirror.update(columns, STEP)
        self.mirror.apply(update)
        if update.whole is not None:
            self.tables = np.split(update.whole, len(columns))
        parts = (np.split(x, len(columns)) for x in (update.changes.index, update.changes.page))
        for g, (index, page) in enumerate(zip(*parts, strict=True)):
            table, got = on_device(self.tables[g], TableChanges(index, page))
            self.tables[g] = np.asarray(table)
            assert got == update.checksum[g]
        return update


@st.composite
def requests_of_a_group(draw: st.DrawFn) -> list[StepRequest]:
    """Requests with any pages, in any slots or none; few new tokens, so that they fit the step."""
    free = draw(st.permutations(range(PAGES)))
    slots = draw(st.permutations(range(RUNNING)))
    requests, used = [], 0
    for i in range(draw(st.integers(0, 4))):
        new, end = draw(st.integers(1, 3)), draw(st.integers(3, WIDTH * PAGE))
        count = -(-end // PAGE)
        pages = free[used : used + count]
        used += count
        slot = slots[i] if draw(st.booleans()) else None
        sampling = SamplingParams() if draw(st.booleans()) else None
        requests.append(StepRequest([1] * new, end - new, pages, sampling, slot=slot))
    return requests


steps = st.integers(1, 2).flatmap(
    lambda dp: st.lists(st.lists(requests_of_a_group(), min_size=dp, max_size=dp), min_size=1, max_size=8)
)


def seen(batch: Batch, at: BatchShape, table: np.ndarray, group: int) -> list[np.ndarray]:
    """The pages that attention sees on each rank of a dp group."""
    pages = jnp.zeros((at.cache.total_pages, PAGE, 1))
    rows: Rows = batch.absorbed
    parts = [np.split(x, at.dp * at.cp) for x in (rows.cu_q, rows.kv_len, rows.kv_start, rows.request)]
    ranks = [Rows(*(part[group * at.cp + k] for part in parts)) for k in range(at.cp)]
    return [np.asarray(cache.row_pages(pages, jnp.asarray(table), rank)) for rank in ranks]


@given(steps)
@settings(deadline=None, max_examples=60)
def test_any_steps_leave_what_each_request_needs(sequence: list[list[list[StepRequest]]]) -> None:
    """Attention sees the same pages as with a table that the step brings: up to a row's last key its request's, none behind."""
    at = shape(len(sequence[0]))
    devices = Devices(at)
    for groups in sequence:
        columns = [RequestColumns.of(requests, at) for requests in groups]
        for c in columns:
            check_requests(c, at, CONFIG)
        update = devices.run(columns)
        np.testing.assert_array_equal(devices.mirror.whole, np.concatenate(devices.tables))
        layout = step_layout([lay_out(c, at, CONFIG) for c in columns], STEP)
        own, kept = build_batch(layout, at), build_batch(layout, at, update)
        assert own.table_changes is None and kept.page_table is None and own.page_table is not None
        for g, (c, rows) in enumerate(zip(columns, update.rows, strict=True)):
            assert len(set(rows)) == len(rows) and all(0 <= row < RUNNING for row in rows)
            for i, row in enumerate(rows):
                assert c.requests[i].slot in (None, row)
                pages = c.pages[c.page_start[i] : c.page_start[i + 1]]
                np.testing.assert_array_equal(devices.tables[g][row, : len(pages)], pages)
            for ours, want in zip(
                seen(kept, at, devices.tables[g], g),
                seen(own, at, np.split(own.page_table, at.dp)[g], g),
                strict=True,
            ):
                np.testing.assert_array_equal(ours, want)


def request(pages: Sequence[int], slot: int, new: int = 1) -> StepRequest:
    return StepRequest([1] * new, len(pages) * PAGE - new, pages, SamplingParams(), slot=slot)


def run(devices: Devices, at: BatchShape, *requests: StepRequest) -> TableUpdate:
    return devices.run([RequestColumns.of(requests, at)])


def test_only_what_changes_is_sent() -> None:
    at = shape()
    devices = Devices(at)
    size = RUNNING * WIDTH
    assert run(devices, at, request([5, 3], 2)).entries[0][0].tolist() == [2 * WIDTH, 2 * WIDTH + 1]
    update = run(devices, at, request([5, 3, 9], 2), request([1], 0))
    entries = dict(zip(update.changes.index.tolist(), update.changes.page.tolist(), strict=True))
    assert {index: page for index, page in entries.items() if index < size} == {2 * WIDTH + 2: 9, 0: 1}
    assert len(entries) == at.table_changes(STEP), "places without a change are each another, past the table"
    again = run(devices, at, request([1], 0), request([5, 3, 9], 2))
    assert (again.changes.index >= size).all(), "nothing, whatever the order"


def test_a_step_with_too_many_changes_sends_the_whole() -> None:
    """Never a part of them: a cached prefix of many pages, several requests that go on."""
    at = shape()
    places = at.table_changes(STEP)
    assert places == RUNNING + 3 < 2 * WIDTH
    devices = Devices(at)
    few = run(devices, at, request(range(WIDTH), 1), request(range(10, 12), 3))
    assert few.whole is None and len(few.entries[0][0]) == places
    many = run(devices, at, request(range(20, 20 + WIDTH), 1), request(range(3, 6), 3))
    assert many.whole is not None and (many.changes.index >= RUNNING * WIDTH).all()
    assert devices.tables[0][1].tolist() == list(range(20, 20 + WIDTH)) and devices.tables[0][3, :3].tolist() == [
        3,
        4,
        5,
    ]
    assert run(devices, at, request(range(20, 20 + WIDTH), 1)).whole is None


def test_what_is_sent_whole_does_not_follow_the_mirror() -> None:
    """JAX may read an array that it is given later than the host goes on."""
    at = shape()
    mirror = TableMirror(at)
    first = mirror.whole
    update = mirror.update([RequestColumns.of([request(range(WIDTH), i) for i in range(2)], at)], STEP)
    assert update.whole is not None
    copy = update.whole.copy()
    mirror.apply(update)
    mirror.apply(mirror.update([RequestColumns.of([request([30], 0)], at)], STEP))
    np.testing.assert_array_equal(update.whole, copy)
    assert (first == at.cache.total_pages).all()


@given(st.data())
@settings(deadline=None, max_examples=60)
def test_the_places_hold_what_a_steps_tokens_begin(data: st.DataObject) -> None:
    """Requests that keep their slots: chunks of prompts beside decoding, with drafts that hold or not."""
    drafts = data.draw(st.integers(0, 4))
    at = shape(drafts=drafts)
    devices = Devices(at)
    computed = dict.fromkeys(range(RUNNING), 0)
    for _ in range(data.draw(st.integers(1, 10))):
        left, requests = at.cp * TOKENS, []
        for slot in data.draw(st.permutations(range(RUNNING))):
            room = min(left, WIDTH * PAGE - computed[slot])
            if room:
                new = data.draw(st.integers(1, room))
                given = data.draw(st.integers(0, min(drafts, new - 1)))
                reach = min(computed[slot] + new + max(drafts - 1, 0), WIDTH * PAGE)
                pages = range(slot * WIDTH, slot * WIDTH + -(-reach // PAGE))
                requests.append(
                    StepRequest([1] * new, computed[slot], pages, SamplingParams(), drafts=given, slot=slot)
                )
                computed[slot] += new - data.draw(st.integers(0, given))
                left -= new
        at_most = dataclasses.replace(at, cache=CacheShape(3, RUNNING * WIDTH, PAGE))
        columns = RequestColumns.of(requests, at_most)
        check_requests(columns, at_most, CONFIG)
        assert devices.run([columns]).whole is None


tables = st.integers(0, 2**32 - 1).map(
    lambda seed: np.random.default_rng(seed).integers(0, PAGES, (RUNNING, WIDTH)).astype(np.uint32)
)


@given(tables, st.integers(0, RUNNING * WIDTH - 1), st.integers(0, 2**32 - 1))
@settings(deadline=None)
def test_no_change_of_an_entry_is_missed(table: np.ndarray, index: int, value: int) -> None:
    changed = table.copy()
    changed.reshape(-1)[index] = value
    assert (checksum(changed) == checksum(table)) == (changed == table).all()


def test_rows_and_entries_that_change_places_are_noticed() -> None:
    """Also in tables as large as those of 64 requests of 1M tokens, and on the devices as on the host."""
    rng = np.random.default_rng(0)
    table = rng.permutation(64 * 16384).reshape(64, 16384).astype(np.uint32)
    checksums = {int(checksum(table))}
    for i, j in rng.permutation(list(itertools.combinations(range(64), 2)))[:200]:
        other, (a, b) = table.copy(), rng.choice(16384, 2, replace=False)
        other[[i, j]] = table[[j, i]]
        checksums.add(int(checksum(other)))
        other = table.copy()
        other[i, a], other[j, b] = table[j, b], table[i, a]
        checksums.add(int(checksum(other)))
    assert len(checksums) == 401
    assert device_checksum(jnp.asarray(table, jnp.int32)) == checksum(table)


@pytest.mark.parametrize("lost", ["a change", "the whole table"])
def test_a_change_that_is_lost_is_noticed(lost: str) -> None:
    """Negative control: the devices did not get what the mirror has."""
    at = shape()
    devices = Devices(at)
    before = devices.tables[0].copy()
    update = run(devices, at, *(request(range(i * WIDTH, (i + 1) * WIDTH), i) for i in range(1 + (lost != "a change"))))
    assert (update.whole is None) == (lost == "a change")
    devices.tables[0] = before
    with pytest.raises(AssertionError):
        run(devices, at, request([30], 4))
