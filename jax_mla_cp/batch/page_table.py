"""The page table that stays on the devices: the entries that a step changes, and a checksum of the whole.

The host knows what the devices hold: it keeps a mirror of it. A step brings the entries in which its requests differ from the mirror, the
devices write them into their table before anything reads it, and return a checksum of all entries, which must be the mirror's. A row
belongs to a request slot, because a request's place in the batch changes from step to step.

Entries behind a request's pages keep what an earlier request left there. Nothing reads them: slots to write and the pages of packed keys
are made on the host from the request's own pages, and attention sees a row only up to its last key (`jax_mla_cp.cache.row_pages`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int32, UInt32
from numpy.typing import NDArray

from jax_mla_cp.batch.arrays import TableChanges
from jax_mla_cp.batch.columns import NO_SLOT, Ints, RequestColumns
from jax_mla_cp.batch.shapes import BatchShape, StepShape

_Words = TypeVar("_Words", NDArray[np.uint32], jax.Array)
_GOLDEN = 0x9E3779B1


@dataclasses.dataclass(frozen=True)
class TableUpdate:
    """A step's part in the devices' tables."""

    rows: Sequence[Ints]
    """Per dp group [I]: each request's row."""
    entries: Sequence[tuple[Ints, Ints]]
    """Per dp group: the entries that differ from the mirror (`row * W + column`), and what they become."""
    changes: TableChanges
    """The changes in the step's own arrays, of all dp groups; none if `whole` is sent before it."""
    whole: Int32[np.ndarray, "dp*I W"] | None
    """The tables with all changes, for a step that has too few places for them."""
    checksum: UInt32[np.ndarray, " dp"]
    """The checksum of each dp group's table, after the changes."""


class TableMirror:
    """The host's copy of the devices' page tables."""

    def __init__(self, shape: BatchShape):
        self._shape = shape
        unused = shape.cache.total_pages
        self._tables = np.full((shape.dp, shape.max_requests, shape.max_pages), unused, np.int32)
        self._checksum = np.full(shape.dp, checksum(self._tables[0].view(np.uint32)), np.uint32)

    @property
    def whole(self) -> Int32[np.ndarray, "dp*I W"]:
        """A copy of the tables, one dp group's after the other. JAX may keep what it is given, and go on reading it."""
        return self._tables.reshape(-1, self._shape.max_pages).copy()

    def update(self, groups: Sequence[RequestColumns], step: StepShape) -> TableUpdate:
        """Returns the changes of a step with these requests. The mirror stays as it is until `apply`."""
        rows = [_rows(c.slot, self._shape.max_requests) for c in groups]
        entries = [_differences(*each) for each in zip(self._tables, rows, groups, strict=True)]
        places = self._shape.table_changes(step)
        changes = _no_changes(self._shape, places)
        after = self._checksum + self._addends(entries)
        if max(len(index) for index, _ in entries) > places:
            tables = self._tables.copy()
            _write(tables, entries)
            return TableUpdate(rows, entries, changes, tables.reshape(-1, self._shape.max_pages), after)
        for g, (index, page) in enumerate(entries):
            mine = slice(g * places, g * places + len(index))
            changes.index[mine], changes.page[mine] = index, page
        return TableUpdate(rows, entries, changes, None, after)

    def apply(self, update: TableUpdate) -> None:
        """Follows a step that the devices will run next."""
        _write(self._tables, update.entries)
        self._checksum = update.checksum

    def _addends(self, entries: Sequence[tuple[Ints, Ints]]) -> UInt32[np.ndarray, " dp"]:
        """Returns the entries' addends to the checksums."""
        added = np.zeros(len(entries), np.uint32)
        for g, (index, page) in enumerate(entries):
            grown = page.astype(np.uint32) - self._tables[g].reshape(-1)[index].astype(np.uint32)
            added[g] = (grown * weights(index.astype(np.uint32))).sum(dtype=np.uint32)
        return added


def apply_changes(table: Int32[Array, "I W"], changes: TableChanges) -> Int32[Array, "I W"]:
    """A dp group's table with a step's changes, in place if it is donated. Per device."""
    flat = table.reshape(-1).at[changes.index].set(changes.page, mode="drop", unique_indices=True)
    return flat.reshape(table.shape)


def device_checksum(table: Int32[Array, "I W"]) -> UInt32[Array, " 1"]:
    """`checksum` of a dp group's table. Per device."""
    words = table.reshape(-1).astype(jnp.uint32)
    return (words * weights(jnp.arange(words.size, dtype=jnp.uint32))).sum(dtype=jnp.uint32, keepdims=True)


def checksum(table: UInt32[np.ndarray, "I W"]) -> np.uint32:
    """The sum of all entries, each times its weight, modulo 2^32. Weights are odd, so that no change of a single entry is missed, and look
    random, so that one of several is missed once in four billion. A sum can be brought up to date by the changes alone."""
    words = table.reshape(-1)
    total: np.uint32 = (words * weights(np.arange(words.size, dtype=np.uint32))).sum(dtype=np.uint32)
    return total


def weights(index: _Words) -> _Words:
    """The weight of each entry, uint32, by its index in the table."""
    mixed = index * np.uint32(_GOLDEN)
    return (mixed ^ (mixed >> np.uint32(15))) | np.uint32(1)


def _rows(slot: Ints, max_requests: int) -> Ints:
    """The table's row of each request: its slot, or without one the first row that no request of the step has."""
    rows, without = slot.copy(), slot == NO_SLOT
    if without.any():
        rows[without] = np.setdiff1d(np.arange(max_requests), slot)[: without.sum()]
    return rows


def _differences(table: NDArray[np.int32], rows: Ints, c: RequestColumns) -> tuple[Ints, Ints]:
    """The entries in which requests differ from a table, and their pages."""
    index = rows[c.page_request] * table.shape[1] + c.page_column
    differs = np.flatnonzero(table.reshape(-1)[index] != c.pages)
    return index[differs], c.pages[differs]


def _no_changes(shape: BatchShape, places: int) -> TableChanges:
    """NumPy arrays for all dp groups: every place has an index past the table, where it is dropped."""
    index = shape.max_requests * shape.max_pages + np.arange(places, dtype=np.int32)
    return TableChanges(np.tile(index, shape.dp), np.zeros(shape.dp * places, np.int32))


def _write(tables: NDArray[np.int32], entries: Sequence[tuple[Ints, Ints]]) -> None:
    """Writes entries into the tables of all dp groups."""
    for table, (index, page) in zip(tables, entries, strict=True):
        table.reshape(-1)[index] = page
