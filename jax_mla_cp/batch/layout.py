"""A step's requests -> all its arrays, on the host (NumPy).

`lay_out` chooses the requests' form of attention and plans the zigzag over the cp ranks; `build` makes the arrays, with the
page slot that each token's latent goes to. The works have been checked before (jax_mla_cp/batch/check.py).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, TypeVar

import jax
import numpy as np
from numpy.typing import NDArray

from jax_mla_cp.batch.arrays import Batch, SamplingArrays, SpeculationArrays
from jax_mla_cp.batch.columns import Columns, Ints, within
from jax_mla_cp.batch.form import use_expanded
from jax_mla_cp.batch.rows import Rows
from jax_mla_cp.batch.shapes import BatchShape, StepShape
from jax_mla_cp.batch.zigzag import Plan, plan
from jax_mla_cp.config.model import ModelConfig

KEY_ALIGN = 128
"""Packed keys of different requests never share a tile of so many keys (FA3's largest KV tile here)."""

_GREEDY_BELOW = 1e-5
"""Temperatures below this are greedy: dividing by them would leave float32's range."""

_T = TypeVar("_T", int, Ints)


@dataclasses.dataclass(frozen=True)
class Layout:
    """One dp group's step: its works in the order of the plan, absorbed ones first."""

    works: Columns
    order: Ints  # [I] the works, in the plan's order
    num_absorbed: int
    plan: Plan

    @property
    def tokens(self) -> int:
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
        mine = p.row_request < self.num_absorbed
        return np.bincount(p.row_rank[mine], weights=p.row_len[mine], minlength=p.cp).astype(np.int64)

    @property
    def expands(self) -> bool:
        return self.num_absorbed < len(self.works.new)

    def places(self, tokens: int) -> tuple[Ints, Ints]:
        """Where the tokens are in the ranks' buffers of so many `tokens`, rank after rank, and which of `works.tokens` each
        is, both in the plan's order."""
        p = self.plan
        rank = np.repeat(np.arange(p.cp), p.rank_tokens)
        place = np.arange(len(rank)) + (np.arange(p.cp) * tokens - p.rank_start[:-1])[rank]
        return place, self.works.start[self.order[p.request]] + p.offset


def lay_out(c: Columns, shape: BatchShape, config: ModelConfig, *, expand: bool = True) -> Layout:
    """Chooses each work's form and plans the zigzag, for a dp group's works that `check_works` has passed.

    Without `expand`, all are absorbed.
    """
    room, expanded = shape.expanded_keys if expand else 0, np.zeros(len(c.new), bool)
    prompt = c.new - c.drafts  # a decoding request stays one, whatever its drafts
    keys = packed_keys(c.end, shape.cache.page_size)
    for i in np.flatnonzero((keys <= room) & (prompt > 1)).tolist():
        if keys[i] <= room and use_expanded(shape.form, config, shape.cp, int(prompt[i]), int(c.cached[i])):
            expanded[i] = True
            room -= int(keys[i])
    order = np.argsort(expanded, kind="stable")
    return Layout(c, order, len(order) - int(expanded.sum()), plan(c.new[order], c.cached[order], cp=shape.cp))


def build(layouts: Sequence[Layout], shape: BatchShape, step: StepShape) -> Batch:
    """The arrays of a step, one layout per dp group.

    Raises:
      ValueError: a layout doesn't fit the step's shape, or only some requests have `embeds`.
    """
    for name, needed, room in (
        ("tokens", max(layout.tokens for layout in layouts), step.tokens),
        ("tokens of absorbed rows", max(layout.absorbed_tokens for layout in layouts), step.absorbed_tokens),
        ("expanded keys", max(_keys(layout, shape) for layout in layouts), step.expanded_keys),
    ):
        if needed > room:
            raise ValueError(f"a rank has {needed} {name}, the step has room for {room}. Use a larger step.")
    groups = [_group(layout, shape, step) for layout in layouts]
    batch = groups[0] if len(groups) == 1 else jax.tree.map(lambda *arrays: np.concatenate(arrays), *groups)
    return dataclasses.replace(batch, embeds=_embeds(layouts, step))


def packed_keys(keys: _T, page_size: int) -> _T:
    """Room for a request's keys: whole pages, and never less than up to the end of its last KV tile."""
    tiled = -(-keys // KEY_ALIGN) * KEY_ALIGN
    return -(-tiled // page_size) * page_size


def _keys(layout: Layout, shape: BatchShape) -> int:
    """Packed keys of a layout's expanded works."""
    return int(packed_keys(layout.works.end[layout.order[layout.num_absorbed :]], shape.cache.page_size).sum())


def _group(layout: Layout, shape: BatchShape, step: StepShape) -> Batch:
    """One dp group's arrays, rank after rank. Places of requests are those of `works`, whatever the plan's order."""
    p, c, cp, page_size, tokens = layout.plan, layout.works, shape.cp, shape.cache.page_size, step.tokens
    page_table = shape.cache.no_page(shape.requests * shape.table_width).reshape(shape.requests, -1)
    page_table[c.page_owner, c.page_column] = c.pages

    place, token = layout.places(tokens)
    request = layout.order[p.request]
    position = c.cached[request] + p.offset

    def at_place(values: NDArray[Any], empty: NDArray[Any]) -> NDArray[Any]:
        empty[place] = values
        return empty

    key_pages, key_start, num_keys = _pack_keys(layout, page_table, shape, step.expanded_keys)
    sampled = p.offset - (c.new - 1 - c.drafts)[request]
    last = sampled >= 0
    rank, on_rank = np.divmod(place[last], tokens)
    last_index = np.full((cp, shape.requests, shape.samples), tokens, np.int32)
    last_index[rank, request[last], sampled[last]] = on_rank
    return Batch(
        tokens=at_place(c.tokens[token], np.zeros(cp * tokens, np.int32)),
        next_tokens=at_place(_next_tokens(c)[token], np.zeros(cp * tokens, np.int32)),
        embeds=None,
        positions=at_place(position, np.zeros(cp * tokens, np.int32)),
        num_tokens=p.rank_tokens.astype(np.int32),
        slots=at_place(
            page_table[request, position // page_size] * page_size + position % page_size,
            shape.cache.no_slot(cp * tokens),
        ),
        fresh=_fresh(c, page_table, shape),
        page_table=page_table,
        key_pages=key_pages,
        num_keys=num_keys,
        expanded=_rows(layout, shape, key_start, expanded=True),
        absorbed=_rows(layout, shape, key_start, expanded=False),
        last_index=last_index.reshape(-1),
        sampling=_sampling(c, shape),
        speculation=_speculation(c, shape) if shape.draft_tokens else None,
        absorbed_tokens=step.absorbed_tokens,
    )


def _embeds(layouts: Sequence[Layout], step: StepShape) -> NDArray[Any] | None:
    """Those of all groups, if the works have any."""
    given = [work.embeds for layout in layouts for work in layout.works.works]
    some = next((np.asarray(values) for values in given if values is not None), None)
    if some is None:
        return None
    if any(values is None for values in given):
        raise ValueError("embeds: give them for all requests of a step or for none.")
    out = np.zeros((len(layouts), layouts[0].plan.cp * step.tokens, some.shape[1]), some.dtype)
    for group, layout in zip(out, layouts, strict=True):
        if layout.works.works:
            place, token = layout.places(step.tokens)
            group[place] = np.concatenate([np.asarray(work.embeds) for work in layout.works.works])[token]
    return out.reshape(-1, some.shape[1])


def _fresh(c: Columns, page_table: NDArray[np.int32], shape: BatchShape) -> NDArray[np.int32]:
    """Pages that the step begins and does not fill."""
    page_size = shape.cache.page_size
    # Of a single one, XLA's scatter may copy the cache.
    fresh = shape.cache.no_page(max(2, shape.requests * shape.fresh))
    first = np.maximum(c.end // page_size, -(-c.cached // page_size))
    for j in range(shape.fresh):
        works = np.flatnonzero(first + j < -(-c.room // page_size))
        fresh[works * shape.fresh + j] = page_table[works, first[works] + j]
    return fresh


def _pack_keys(
    layout: Layout, page_table: NDArray[np.int32], shape: BatchShape, room: int
) -> tuple[NDArray[np.int32], NDArray[np.int32], NDArray[np.int32]]:
    """(pages of the packed keys, where each request's keys begin, how far the keys reach). Gaps read as zeros."""
    page_size = shape.cache.page_size
    key_pages = shape.cache.no_page(room // page_size)
    start = np.zeros(shape.requests, np.int32)
    expanded = layout.order[layout.num_absorbed :]
    keys = layout.works.end[expanded]
    packed, used = packed_keys(keys, page_size), -(-keys // page_size)
    start[expanded] = np.cumsum(packed) - packed
    owner, column = np.repeat(expanded, used), within(used)
    key_pages[start[owner] // page_size + column] = page_table[owner, column]
    return key_pages, start, np.array([packed.sum()], np.int32)


def _rows(layout: Layout, shape: BatchShape, key_start: NDArray[np.int32], *, expanded: bool) -> Rows:
    """The plan's rows of one form, rank after rank, each rank's filled up with empty ones."""
    p, most = layout.plan, 2 * shape.requests
    mine = np.flatnonzero((p.row_request >= layout.num_absorbed) == expanded)
    rank = p.row_rank[mine]
    place = within(np.bincount(rank, minlength=shape.cp))
    cu_q = np.zeros((shape.cp, most + 1), np.int32)
    cu_q[rank, place + 1] = p.row_len[mine]
    if expanded:
        cu_q[:, 0] = layout.rank_absorbed
    others = np.zeros((3, shape.cp, most), np.int32)
    request = layout.order[p.row_request[mine]]
    others[:, rank, place] = p.row_kv_len[mine], key_start[request], request
    kv_len, kv_start, request = others.reshape(3, -1)
    return Rows(
        cu_q=np.cumsum(cu_q, axis=1, dtype=np.int32).reshape(-1), kv_len=kv_len, kv_start=kv_start, request=request
    )


def _next_tokens(c: Columns) -> Ints:
    """[M]: the token after each; -1 where the step samples it, whatever guess may follow."""
    following = np.append(c.tokens[1:], -1)
    following[within(c.new) >= np.repeat(c.new - 1 - c.drafts, c.new)] = -1
    following[c.start[1:] - 1] = c.next_token
    return following


def _sampling(c: Columns, shape: BatchShape) -> SamplingArrays:
    """A request's settings in each of its places that a token is drawn for; 0 and off elsewhere."""
    settings = [
        (s.temperature, s.top_p, s.top_k, s.min_p, s.seed & 0xFFFFFFFF, (s.seed >> 32) & 0xFFFFFFFF)
        for s in (work.sampling for work in c.works)
        if s is not None
    ]
    number = np.arange(shape.samples)
    work = np.flatnonzero(c.sampled)
    row, place = np.nonzero(number <= c.drafts[work, None])

    def spread(values: NDArray[Any], empty: float, dtype: Any) -> NDArray[Any]:
        out = np.full((shape.requests, shape.samples, *values.shape[1:]), empty, dtype)
        out[work[row], place] = values[row]
        return out.reshape(-1, *values.shape[1:])

    # float64 holds each exactly: also the halves of a seed.
    temperature, top_p, top_k, min_p, *seed = np.array(settings, np.float64).reshape(-1, 6).T
    position = np.zeros((shape.requests, shape.samples), np.int32)
    position[work[row], place] = (c.end - c.drafts)[work[row]] + place
    return SamplingArrays(
        temperature=spread(np.where(temperature >= _GREEDY_BELOW, temperature, 0), 0, np.float32),
        top_p=spread(top_p, 1, np.float32),
        top_k=spread(top_k, 0, np.int32),
        min_p=spread(min_p, 0, np.float32),
        seed=spread(np.stack(seed, axis=1), 0, np.uint32),
        position=position.reshape(-1),
    )


def _speculation(c: Columns, shape: BatchShape) -> SpeculationArrays:
    drafts = np.full((shape.requests, shape.draft_tokens), -1, np.int32)
    owner, column = np.repeat(np.arange(len(c.new)), c.drafts), within(c.drafts)
    drafts[owner, column] = c.tokens[(c.start[1:] - c.drafts)[owner] + column]
    first, room = np.zeros(shape.requests, np.int32), np.zeros(shape.requests, np.int32)
    first[: len(c.new)] = c.end - c.drafts - 1
    room[: len(c.new)] = c.room
    return SpeculationArrays(drafts, first, room)
