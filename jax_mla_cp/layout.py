"""A step's requests -> all its arrays, on the host (NumPy).

`lay_out` chooses the requests' form of attention and plans the zigzag over the cp ranks; `build` makes the arrays, with the
page slot that each token's latent goes to. The works have been checked before (jax_mla_cp/check.py).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from numpy.typing import NDArray

from jax_mla_cp.attention.form import use_expanded
from jax_mla_cp.attention.rows import Rows
from jax_mla_cp.batch import Batch, BatchShape, SamplingArrays, SpeculationArrays, StepShape, Work
from jax_mla_cp.config import ModelConfig
from jax_mla_cp.zigzag import Plan, plan

KEY_ALIGN = 128
"""Packed keys of different requests never share a tile of so many keys (FA3's largest KV tile here)."""

_GREEDY_BELOW = 1e-5
"""Temperatures below this are greedy: dividing by them would leave float32's range."""


@dataclasses.dataclass(frozen=True)
class Layout:
    """One dp group's step: its works in the order of the plan, absorbed ones first."""

    works: Sequence[Work]
    order: NDArray[np.int64]  # [I] indices into works
    num_absorbed: int
    plan: Plan

    @property
    def tokens(self) -> int:
        """Tokens of the fullest rank: what the buffer must hold."""
        return int(self.plan.rank_tokens.max())

    @property
    def absorbed_tokens(self) -> int:
        """Tokens of absorbed rows on the rank with the most of them."""
        p = self.plan
        mine = p.row_request < self.num_absorbed
        return int(np.bincount(p.row_rank[mine], weights=p.row_len[mine], minlength=p.cp).max())

    @property
    def expands(self) -> bool:
        return self.num_absorbed < len(self.works)


def lay_out(works: Sequence[Work], shape: BatchShape, config: ModelConfig, *, expand: bool = True) -> Layout:
    """Chooses each work's form and plans the zigzag, for a dp group's works that `check_works` has passed.

    Without `expand`, all are absorbed.
    """
    room, expanded = shape.expanded_keys if expand else 0, []
    for i, work in enumerate(works):
        keys = packed_keys(work.cached + len(work.tokens), shape.cache.page_size)
        prompt = len(work.tokens) - work.drafts  # a decoding request stays one, whatever its drafts
        if keys <= room and use_expanded(shape.form, config, shape.cp, prompt, work.cached):
            expanded.append(i)
            room -= keys
    absorbed = np.setdiff1d(np.arange(len(works)), expanded)
    order = np.concatenate([absorbed, np.array(expanded, np.int64)])
    new = [len(works[i].tokens) for i in order]
    return Layout(works, order, len(absorbed), plan(new, [works[i].cached for i in order], cp=shape.cp))


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
    have = {work.embeds is not None for layout in layouts for work in layout.works}
    if len(have) > 1:
        raise ValueError("embeds: give them for all requests of a step or for none.")
    groups = [_group(layout, shape, step, embeds=True in have) for layout in layouts]
    if True in have:  # a dp group without requests has no embeds to tell their width by
        like = next(g.embeds for g in groups if g.embeds is not None)
        groups = [g if g.embeds is not None else dataclasses.replace(g, embeds=np.zeros_like(like)) for g in groups]
    return groups[0] if len(groups) == 1 else jax.tree.map(lambda *arrays: np.concatenate(arrays), *groups)


def packed_keys(keys: int, page_size: int) -> int:
    """Room for a request's keys: whole pages, and never less than up to the end of its last KV tile."""
    tiled = -(-keys // KEY_ALIGN) * KEY_ALIGN
    return -(-tiled // page_size) * page_size


def _keys(layout: Layout, shape: BatchShape) -> int:
    """Packed keys of a layout's expanded works."""
    expanded = [layout.works[i] for i in layout.order[layout.num_absorbed :]]
    return sum(packed_keys(work.cached + len(work.tokens), shape.cache.page_size) for work in expanded)


def _group(layout: Layout, shape: BatchShape, step: StepShape, *, embeds: bool) -> Batch:
    """One dp group's arrays, rank after rank. Places of requests are those of `works`, whatever the plan's order."""
    p, cp, page_size, works, order = layout.plan, shape.cp, shape.cache.page_size, layout.works, layout.order
    tokens = step.tokens
    page_table = shape.cache.no_page(shape.requests * shape.table_width).reshape(shape.requests, -1)
    # Of a single one, XLA's scatter may copy the cache.
    fresh = shape.cache.no_page(max(2, shape.requests * shape.fresh))
    for i, work in enumerate(works):
        end = work.cached + len(work.tokens)
        whole, used = end // page_size, -(-shape.room(work) // page_size)
        page_table[i, :used] = work.pages[:used]
        begun = work.pages[max(whole, -(-work.cached // page_size)) : used]
        fresh[i * shape.fresh :][: len(begun)] = begun

    # Each token's place in the buffers: its rank's, at its place within the rank.
    rank = np.repeat(np.arange(cp), p.rank_tokens)
    on_rank = np.arange(len(rank)) - p.rank_start[rank]
    place = rank * tokens + on_rank
    request = order[p.request]
    position = np.array([w.cached for w in works], np.int32)[request] + p.offset if works else p.offset
    slots = page_table[request, position // page_size] * page_size + position % page_size

    def spread(per_work: list[NDArray[Any]], empty: NDArray[Any]) -> NDArray[Any]:
        """Values of the works' tokens, in the order of the works, to the tokens' places."""
        if works:
            start = np.cumsum([0, *(len(w.tokens) for w in works)])
            empty[place] = np.concatenate(per_work)[start[request] + p.offset]
        return empty

    def at_place(values: NDArray[Any], empty: NDArray[Any]) -> NDArray[Any]:
        empty[place] = values
        return empty

    key_pages, key_start, num_keys = _pack_keys(layout, page_table, shape, step.expanded_keys)
    sampled = p.offset - np.array([len(w.tokens) - 1 - w.drafts for w in works], np.int64)[request]
    last = sampled >= 0
    last_index = np.full((cp, shape.requests, shape.samples), tokens, np.int32)
    last_index[rank[last], request[last], sampled[last]] = on_rank[last]
    absorbed = np.arange(len(works)) < layout.num_absorbed
    return Batch(
        tokens=spread([np.asarray(w.tokens, np.int32) for w in works], np.zeros(cp * tokens, np.int32)),
        next_tokens=spread([_next_tokens(w) for w in works], np.zeros(cp * tokens, np.int32)),
        embeds=_embeds(works, spread, cp * tokens) if embeds and works else None,
        positions=at_place(position, np.zeros(cp * tokens, np.int32)),
        num_tokens=p.rank_tokens.astype(np.int32),
        slots=at_place(slots, shape.cache.no_slot(cp * tokens)),
        fresh=fresh,
        page_table=page_table,
        key_pages=key_pages,
        num_keys=num_keys,
        expanded=_rows(layout, shape, ~absorbed, key_start),
        absorbed=_rows(layout, shape, absorbed, key_start),
        last_index=last_index.reshape(-1),
        sampling=_sampling(works, shape),
        speculation=_speculation(works, shape) if shape.draft_tokens else None,
        absorbed_tokens=step.absorbed_tokens,
    )


def _embeds(works: Sequence[Work], spread: Callable[..., NDArray[Any]], size: int) -> NDArray[Any]:
    values = [np.asarray(w.embeds) for w in works]
    return spread(values, np.zeros((size, values[0].shape[1]), values[0].dtype))


def _pack_keys(
    layout: Layout, page_table: NDArray[np.int32], shape: BatchShape, room: int
) -> tuple[NDArray[np.int32], NDArray[np.int32], NDArray[np.int32]]:
    """(pages of the packed keys, where each request's keys begin, how far the keys reach). Gaps read as zeros."""
    page_size = shape.cache.page_size
    key_pages = shape.cache.no_page(room // page_size)
    start = np.zeros(shape.requests, np.int32)
    at = 0
    for i in layout.order[layout.num_absorbed :]:
        keys = layout.works[i].cached + len(layout.works[i].tokens)
        used = -(-keys // page_size)
        start[i] = at
        key_pages[at // page_size : at // page_size + used] = page_table[i, :used]
        at += packed_keys(keys, page_size)
    return key_pages, start, np.array([at], np.int32)


def _rows(layout: Layout, shape: BatchShape, chosen: NDArray[np.bool_], key_start: NDArray[np.int32]) -> Rows:
    """The rows of the plan's chosen requests, rank after rank, each rank's filled up with empty ones."""
    p, most = layout.plan, 2 * shape.requests
    cu_q = np.zeros((shape.cp, most + 1), np.int32)
    others = np.zeros((3, shape.cp, most), np.int32)
    for k in range(shape.cp):
        on_rank = np.flatnonzero(p.row_rank == k)
        mine = on_rank[chosen[p.row_request[on_rank]]]
        # The plan has the absorbed requests' rows first: what is chosen is one run of the rank's tokens.
        before = on_rank[on_rank < mine[0]] if len(mine) else on_rank[:0]
        lengths = np.zeros(most, np.int32)
        lengths[: len(mine)] = p.row_len[mine]
        cu_q[k] = p.row_len[before].sum() + np.concatenate([[0], np.cumsum(lengths)])
        request = layout.order[p.row_request[mine]]
        others[:, k, : len(mine)] = p.row_kv_len[mine], key_start[request], request
    kv_len, kv_start, request = others.reshape(3, -1)
    return Rows(cu_q=cu_q.reshape(-1), kv_len=kv_len, kv_start=kv_start, request=request)


def _next_tokens(work: Work) -> NDArray[np.int32]:
    """[len(tokens)]: the token after each; -1 where the step samples it, whatever guess may follow."""
    following = np.full(len(work.tokens), -1, np.int32)
    known = len(work.tokens) - 1 - work.drafts
    following[:known] = np.asarray(work.tokens)[1 : known + 1]
    if work.next_token is not None:
        following[-1] = work.next_token
    return following


def _sampling(works: Sequence[Work], shape: BatchShape) -> SamplingArrays:
    size = (shape.requests, shape.samples)
    temperature, top_p = np.zeros(size, np.float32), np.ones(size, np.float32)
    top_k, position, seed = np.zeros(size, np.int32), np.zeros(size, np.int32), np.zeros((*size, 2), np.uint32)
    for i, work in enumerate(works):
        if work.sampling is None:
            continue
        s, places = work.sampling, slice(work.drafts + 1)
        temperature[i, places] = s.temperature if s.temperature >= _GREEDY_BELOW else 0
        top_p[i, places], top_k[i, places] = s.top_p, s.top_k
        position[i, places] = work.cached + len(work.tokens) - work.drafts + np.arange(work.drafts + 1)
        seed[i, places] = (s.seed & 0xFFFFFFFF, (s.seed >> 32) & 0xFFFFFFFF)
    return SamplingArrays(temperature.reshape(-1), top_p.reshape(-1), top_k.reshape(-1), seed.reshape(-1, 2),
                          position.reshape(-1))  # fmt: skip


def _speculation(works: Sequence[Work], shape: BatchShape) -> SpeculationArrays:
    drafts = np.full((shape.requests, shape.draft_tokens), -1, np.int32)
    first, room = np.zeros(shape.requests, np.int32), np.zeros(shape.requests, np.int32)
    for i, work in enumerate(works):
        known = len(work.tokens) - work.drafts
        drafts[i, : work.drafts] = work.tokens[known:]
        first[i] = work.cached + known - 1
        room[i] = shape.room(work)
    return SpeculationArrays(drafts, first, room)
