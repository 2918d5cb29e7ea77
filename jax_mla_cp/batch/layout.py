"""A step's requests laid out over the ranks, and the arrays that follow, on the host (NumPy).

`lay_out` chooses each request's form of attention and plans the zigzag over the cp ranks; `build_batch` makes the arrays, with the
slot that each token's latent goes to. `jax_mla_cp.batch.check` has checked the requests before.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, TypeVar

import jax
import numpy as np
from numpy.typing import NDArray

from jax_mla_cp.batch.arrays import Batch, SamplingArrays, SpeculationArrays
from jax_mla_cp.batch.columns import Ints, RequestColumns, ragged_arange
from jax_mla_cp.batch.form import use_expanded
from jax_mla_cp.batch.page_table import TableUpdate
from jax_mla_cp.batch.rows import Rows
from jax_mla_cp.batch.shapes import BatchShape, StepShape
from jax_mla_cp.batch.zigzag import Plan, plan
from jax_mla_cp.config.model import ModelConfig

KEY_ALIGN = 128
"""Keys of a tile that packed keys of different requests never share (FA3's largest KV tile here)."""

_GREEDY_BELOW = 1e-5
"""Temperatures below this are greedy: dividing by them would leave float32's range."""

_T = TypeVar("_T", int, Ints)


@dataclasses.dataclass(frozen=True)
class GroupLayout:
    """One dp group's step: its requests in the order of the zigzag plan, absorbed ones first."""

    columns: RequestColumns
    order: Ints
    """[I]: the requests' numbers, in the plan's order."""
    num_absorbed: int
    plan: Plan

    @property
    def max_tokens(self) -> int:
        """Tokens of the fullest rank: what the buffer must hold."""
        return int(self.plan.rank_tokens.max())

    @property
    def absorbed_tokens(self) -> int:
        """Tokens of absorbed rows on the rank with the most of them."""
        return int(self.rank_absorbed.max())

    @property
    def rank_absorbed(self) -> Ints:
        """[cp]: tokens of absorbed rows, which every rank's buffer begins with."""
        p = self.plan
        absorbed = p.row_request < self.num_absorbed
        return np.bincount(p.row_rank[absorbed], weights=p.row_len[absorbed], minlength=p.cp).astype(np.int64)

    @property
    def has_expanded(self) -> bool:
        return self.num_absorbed < len(self.order)

    def buffer_index(self, tokens: int) -> tuple[Ints, Ints]:
        """For each new token, in the plan's order: its index in the ranks' buffers of `tokens` tokens, which follow each
        other, and its index in `columns.tokens`."""
        p = self.plan
        rank = np.repeat(np.arange(p.cp), p.rank_tokens)
        index = np.arange(len(rank)) + (np.arange(p.cp) * tokens - p.rank_start[:-1])[rank]
        return index, self.columns.start[self.order[p.request]] + p.offset


@dataclasses.dataclass(frozen=True)
class StepLayout:
    """A step: its requests laid out in each dp group, and the program's shape that holds them."""

    groups: Sequence[GroupLayout]
    step: StepShape
    rank_tokens: Ints
    """[cp]: new tokens of each cp rank, summed over the dp groups."""
    rank_pairs: Ints
    """[cp]: query-key pairs of each cp rank, the cost of its attention, summed over the dp groups."""

    @property
    def columns(self) -> list[RequestColumns]:
        """The requests of each dp group."""
        return [group.columns for group in self.groups]


def lay_out(c: RequestColumns, shape: BatchShape, config: ModelConfig, *, expand: bool = True) -> GroupLayout:
    """Chooses each request's form and plans the zigzag, for a dp group's requests that `check_requests` has passed.

    Without `expand`, all are absorbed.
    """
    capacity, expanded = shape.expanded_keys if expand else 0, np.zeros(len(c.num_new_tokens), bool)
    prompt = c.num_new_tokens - c.num_drafts  # a decoding request stays one, whatever its drafts
    keys = packed_keys(c.end, shape.cache.page_size)
    for i in np.flatnonzero((keys <= capacity) & (prompt > 1)).tolist():
        if keys[i] <= capacity and use_expanded(
            shape.form, config, shape.cp, int(prompt[i]), int(c.num_computed_tokens[i])
        ):
            expanded[i] = True
            capacity -= int(keys[i])
    order = np.argsort(expanded, kind="stable")
    zigzag = plan(c.num_new_tokens[order], c.num_computed_tokens[order], cp=shape.cp)
    return GroupLayout(c, order, len(order) - int(expanded.sum()), zigzag)


def build_batch(layout: StepLayout, shape: BatchShape, update: TableUpdate | None = None) -> Batch:
    """The arrays of a step, all devices' one after the other.

    Args:
      update: the step's part in a page table that the devices have. None: the batch brings a table of its own.

    Raises:
      ValueError: a layout doesn't fit the step's shape, or only some requests have `embeds`.
    """
    groups, step = layout.groups, layout.step
    for name, needed, capacity in (
        ("tokens", max(group.max_tokens for group in groups), step.tokens),
        ("tokens of absorbed rows", max(group.absorbed_tokens for group in groups), step.absorbed_tokens),
        ("expanded keys", max(_expanded_keys(group, shape) for group in groups), step.expanded_keys),
    ):
        if needed > capacity:
            raise ValueError(f"a rank has {needed} {name}, the step has room for {capacity}. Use a larger step.")
    rows = [np.arange(len(group.columns.requests)) for group in groups] if update is None else update.rows
    batches = [_group_batch(group, shape, step, each) for group, each in zip(groups, rows, strict=True)]
    batch = batches[0] if len(batches) == 1 else jax.tree.map(lambda *arrays: np.concatenate(arrays), *batches)
    batch = dataclasses.replace(batch, embeds=_embeds(groups, step))
    if update is None:
        return dataclasses.replace(batch, page_table=np.concatenate([_page_table(g.columns, shape) for g in groups]))
    return dataclasses.replace(batch, table_changes=update.changes)


def packed_keys(keys: _T, page_size: int) -> _T:
    """Packed keys that a request's keys take: whole pages, at least up to the end of its last KV tile."""
    tiled = -(-keys // KEY_ALIGN) * KEY_ALIGN
    return -(-tiled // page_size) * page_size


def _expanded_keys(layout: GroupLayout, shape: BatchShape) -> int:
    """Packed keys of a layout's expanded requests."""
    return int(packed_keys(layout.columns.end[layout.order[layout.num_absorbed :]], shape.cache.page_size).sum())


def _page_table(c: RequestColumns, shape: BatchShape) -> NDArray[np.int32]:
    """A dp group's page table, in which each request's row is its place."""
    page_table = shape.cache.unused_pages(shape.max_requests * shape.max_pages).reshape(shape.max_requests, -1)
    page_table[c.page_request, c.page_column] = c.pages
    return page_table


def _group_batch(layout: GroupLayout, shape: BatchShape, step: StepShape, table_rows: Ints) -> Batch:
    """One dp group's arrays but those of the page table, rank after rank. Requests have the places of `columns`, whatever the plan's
    order.

    Args:
      table_rows: [I]: each request's row in the page table.
    """
    p, c, cp, page_size, tokens = layout.plan, layout.columns, shape.cp, shape.cache.page_size, step.tokens
    index, token = layout.buffer_index(tokens)
    request = layout.order[p.request]
    position = c.num_computed_tokens[request] + p.offset

    def in_buffers(values: NDArray[Any], padding: NDArray[Any]) -> NDArray[Any]:
        padding[index] = values
        return padding

    key_pages, key_start, num_keys = _pack_keys(layout, shape, step.expanded_keys)
    sample = (
        p.offset - (c.num_new_tokens - 1 - c.num_drafts)[request]
    )  # which of the request's samples follows the token
    last = sample >= 0
    rank, index_on_rank = np.divmod(index[last], tokens)
    last_index = np.full((cp, shape.max_requests, shape.samples_per_request), tokens, np.int32)
    last_index[rank, request[last], sample[last]] = index_on_rank
    return Batch(
        tokens=in_buffers(c.tokens[token], np.zeros(cp * tokens, np.int32)),
        next_tokens=in_buffers(c.next_tokens[token], np.zeros(cp * tokens, np.int32)),
        embeds=None,
        positions=in_buffers(position, np.zeros(cp * tokens, np.int32)),
        num_tokens=p.rank_tokens.astype(np.int32),
        slot_mapping=in_buffers(
            shape.cache.slot_of(c.page(request, position // page_size), position % page_size),
            shape.cache.unused_slots(cp * tokens),
        ),
        pages_to_zero=_pages_to_zero(c, shape),
        page_table=None,
        table_changes=None,
        key_pages=key_pages,
        num_keys=num_keys,
        expanded=_rows(layout, shape, key_start, table_rows, expanded=True),
        absorbed=_rows(layout, shape, key_start, table_rows, expanded=False),
        last_index=last_index.reshape(-1),
        sampling=_sampling(c, shape),
        slots=None if shape.draft_tokens else _slots(c, shape),
        speculation=_speculation(c, shape, table_rows) if shape.draft_tokens else None,
        absorbed_tokens=step.absorbed_tokens,
    )


def _embeds(groups: Sequence[GroupLayout], step: StepShape) -> NDArray[Any] | None:
    """The input embeddings of all groups, if their requests bring any."""
    embeds = [request.embeds for group in groups for request in group.columns.requests]
    first = next((np.asarray(values) for values in embeds if values is not None), None)
    if first is None:
        return None
    if any(values is None for values in embeds):
        raise ValueError("embeds: give them for all requests of a step or for none.")
    out = np.zeros((len(groups), groups[0].plan.cp * step.tokens, first.shape[1]), first.dtype)
    for rows, group in zip(out, groups, strict=True):
        if group.columns.requests:
            index, token = group.buffer_index(step.tokens)
            rows[index] = np.concatenate([np.asarray(request.embeds) for request in group.columns.requests])[token]
    return out.reshape(-1, first.shape[1])


def _pages_to_zero(c: RequestColumns, shape: BatchShape) -> NDArray[np.int32]:
    """Pages that the step begins and does not fill."""
    page_size, count = shape.cache.page_size, shape.max_pages_to_zero
    # At least two: with a single index, XLA's scatter may copy the cache.
    pages = shape.cache.unused_pages(max(2, shape.max_requests * count))
    first = np.maximum(c.end // page_size, -(-c.num_computed_tokens // page_size))
    for j in range(count):
        begun = np.flatnonzero(first + j < -(-c.writable_end // page_size))
        pages[begun * count + j] = c.page(begun, first[begun] + j)
    return pages


def _pack_keys(
    layout: GroupLayout, shape: BatchShape, capacity: int
) -> tuple[NDArray[np.int32], NDArray[np.int32], NDArray[np.int32]]:
    """(pages of the packed keys, where each request's keys begin, number of packed keys). Gaps read as zeros."""
    page_size = shape.cache.page_size
    key_pages = shape.cache.unused_pages(capacity // page_size)
    start = np.zeros(shape.max_requests, np.int32)
    expanded = layout.order[layout.num_absorbed :]
    keys = layout.columns.end[expanded]
    packed, num_pages = packed_keys(keys, page_size), -(-keys // page_size)
    start[expanded] = np.cumsum(packed) - packed
    request, column = np.repeat(expanded, num_pages), ragged_arange(num_pages)
    key_pages[start[request] // page_size + column] = layout.columns.page(request, column)
    return key_pages, start, np.array([packed.sum()], np.int32)


def _rows(
    layout: GroupLayout, shape: BatchShape, key_start: NDArray[np.int32], table_rows: Ints, *, expanded: bool
) -> Rows:
    """The plan's rows of one form, rank after rank, each rank's filled up with empty ones."""
    p, max_rows = layout.plan, 2 * shape.max_requests
    selected = np.flatnonzero((p.row_request >= layout.num_absorbed) == expanded)
    rank = p.row_rank[selected]
    row = ragged_arange(np.bincount(rank, minlength=shape.cp))
    cu_q = np.zeros((shape.cp, max_rows + 1), np.int32)
    cu_q[rank, row + 1] = p.row_len[selected]
    if expanded:
        cu_q[:, 0] = layout.rank_absorbed
    others = np.zeros((3, shape.cp, max_rows), np.int32)
    request = layout.order[p.row_request[selected]]
    others[:, rank, row] = p.row_kv_len[selected], key_start[request], table_rows[request]
    kv_len, kv_start, request = others.reshape(3, -1)
    return Rows(
        cu_q=np.cumsum(cu_q, axis=1, dtype=np.int32).reshape(-1), kv_len=kv_len, kv_start=kv_start, request=request
    )


def _sampling(c: RequestColumns, shape: BatchShape) -> SamplingArrays:
    """Each request's parameters at the places of its sampled tokens; 0 and off elsewhere."""
    params = [
        (s.temperature, s.top_p, s.top_k, s.min_p, s.seed & 0xFFFFFFFF, (s.seed >> 32) & 0xFFFFFFFF)
        for s in (request.sampling for request in c.requests)
        if s is not None
    ]
    sampling = np.flatnonzero(c.needs_sampling)
    row, sample = np.nonzero(np.arange(shape.samples_per_request) <= c.num_drafts[sampling, None])
    request = sampling[row]

    def at_places(values: NDArray[Any], off: float, dtype: Any) -> NDArray[Any]:
        out = np.full((shape.max_requests, shape.samples_per_request, *values.shape[1:]), off, dtype)
        out[request, sample] = values[row]
        return out.reshape(-1, *values.shape[1:])

    # float64 holds each exactly, the halves of a seed too.
    temperature, top_p, top_k, min_p, *seed = np.array(params, np.float64).reshape(-1, 6).T
    position = np.zeros((shape.max_requests, shape.samples_per_request), np.int32)
    position[request, sample] = (c.end - c.num_drafts)[request] + sample
    return SamplingArrays(
        temperature=at_places(np.where(temperature >= _GREEDY_BELOW, temperature, 0), 0, np.float32),
        top_p=at_places(top_p, 1, np.float32),
        top_k=at_places(top_k, 0, np.int32),
        min_p=at_places(min_p, 0, np.float32),
        seed=at_places(np.stack(seed, axis=1), 0, np.uint32),
        position=position.reshape(-1),
    )


def _slots(c: RequestColumns, shape: BatchShape) -> NDArray[np.int32]:
    """The slot of each place's sampled token; one beyond the last for none."""
    slots = np.full(shape.max_requests, shape.max_requests, np.int32)
    slots[: len(c.slot)] = np.where(c.needs_sampling, np.minimum(c.slot, shape.max_requests), shape.max_requests)
    return slots


def _speculation(c: RequestColumns, shape: BatchShape, table_rows: Ints) -> SpeculationArrays:
    count = len(c.num_new_tokens)
    drafts = np.full((shape.max_requests, shape.draft_tokens), -1, np.int32)
    request, column = np.repeat(np.arange(count), c.num_drafts), ragged_arange(c.num_drafts)
    drafts[request, column] = c.tokens[(c.start[1:] - c.num_drafts)[request] + column]
    first_position, writable_end, table_row = np.zeros((3, shape.max_requests), np.int32)
    first_position[:count] = c.end - c.num_drafts - 1
    writable_end[:count] = c.writable_end
    table_row[:count] = table_rows
    return SpeculationArrays(drafts, first_position, writable_end, table_row)
