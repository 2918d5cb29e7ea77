"""The CPU handlers through `attention/fa3.py`: what they compute, and how the call fits into JAX.

The arrays are tiny: the handlers are plain loops.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import PartitionSpec as P

from jax_mla_cp import cache, extension
from jax_mla_cp.attention import fa3, xla
from jax_mla_cp.batch import zigzag
from jax_mla_cp.batch.rows import Rows
from jax_mla_cp.mesh import make_mesh
from tests.helpers import attention_cases as cases
from tests.helpers.attention_cases import (
    ABSORBED,
    BF16,
    LATENT,
    QUERY,
    RAGGED,
    ROPE,
    TARGETS,
    TWO,
    VALUE,
    Case,
    Row,
    make,
)

pytest.importorskip("jax_mla_cp._ffi", reason="the extension is not built")

DRAFTS = tuple(Row(queries, 40 + 31 * queries, queries - 1) for queries in range(1, 9))


@pytest.mark.parametrize("rows", [RAGGED, DRAFTS], ids=["ragged", "drafts"])
@pytest.mark.parametrize("align", [cases.KEY_TILE, 7])
def test_expanded(rows: tuple[Row, ...], align: int) -> None:
    cases.expanded(rows, 2, align=align).check("mla_prefill_expanded")


@pytest.mark.parametrize("rows", [RAGGED, DRAFTS], ids=["ragged", "drafts"])
@pytest.mark.parametrize("page_size", [64, 128, 192])
def test_absorbed(rows: tuple[Row, ...], page_size: int) -> None:
    case = cases.absorbed(rows, 2, page_size, seed=page_size)
    case.check("mla_prefill_absorbed")
    for got, want in zip(case.run("mla_decode"), case.run("mla_prefill_absorbed"), strict=True):
        np.testing.assert_array_equal(got, want)


def test_no_rows_at_all() -> None:
    for target in TARGETS:
        make(target, (Row(0, 3, 0), Row(0, 0, 0))).check(target)


def test_splits_are_made_once_for_calls_of_one_size() -> None:
    """They change nothing here, where keys are not split; tokens that decode does not take get none."""
    case = make("mla_decode")
    tokens, heads = case.operands[1].shape[:2]
    scheduled = fa3.schedule(case.rows, tokens, heads)
    assert scheduled.splits is not None and scheduled.splits.shape == (16,)
    dataclasses.replace(case, rows=scheduled).check("mla_decode")
    for other in (0, fa3.DECODE_TOKENS + 1):
        assert fa3.schedule(case.rows, other, heads).splits is None


@pytest.mark.parametrize("target", TARGETS)
def test_one_key_less_fails_the_check(target: str) -> None:
    case = make(target)
    rows = dataclasses.replace(case.rows, kv_len=case.rows.kv_len - np.int32([0, 1]))
    with pytest.raises(AssertionError):
        dataclasses.replace(case, rows=rows).check(target)


@pytest.mark.parametrize("target", TARGETS)
def test_what_belongs_to_no_row_changes_nothing(target: str) -> None:
    for got, want in zip(make(target, RAGGED).run(target), make(target, RAGGED, fill=7.0).run(target), strict=True):
        np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("target", TARGETS)
def test_a_neighbor_with_nan_keys_changes_nothing(target: str) -> None:
    want, _ = make(target).run(target)
    got, _ = make(target, poison=[1]).run(target)
    mine = np.arange(len(want)) < cases.BEFORE + TWO[0].queries
    np.testing.assert_array_equal(got[mine], want[mine])
    assert np.isnan(got[~mine].astype(np.float32)).any(), "the neighbor's own output shows the NaN"


SEAM: dict[str, tuple[Callable[..., jax.Array], ...]] = {
    "expanded": (fa3.attend_expanded, xla.attend_expanded),
    "absorbed": (fa3.attend_absorbed, xla.attend_absorbed),
}


@pytest.mark.parametrize("form", SEAM)
def test_agrees_with_xla(form: str) -> None:
    """The other implementation of the seam."""
    case = cases.expanded(RAGGED, 2) if form == "expanded" else cases.absorbed(RAGGED, 2, 64)
    got, want = (
        np.asarray(jax.jit(attend, static_argnames="scale")(*case.operands, case.rows, scale=case.scale), np.float64)
        for attend in SEAM[form]
    )
    assert np.linalg.norm(got - want) < 2 * cases.ERROR * np.linalg.norm(want)


LENGTHS, PREFIXES = [21, 1, 9], [0, 40, 70]


@pytest.mark.parametrize("cp", [2, 3])
@pytest.mark.parametrize("target", TARGETS)
def test_all_ranks_equal_the_unsharded_call(target: str, cp: int) -> None:
    rows = [Row(new, new + prefix, i) for i, (new, prefix) in enumerate(zip(LENGTHS, PREFIXES, strict=True))]
    case = make(target, tuple(rows))
    full, _ = case.run(target)
    real = slice(cases.BEFORE, cases.BEFORE + sum(LENGTHS))
    plan = zigzag.plan(LENGTHS, PREFIXES, cp=cp)
    wrong = dataclasses.replace(plan, row_kv_len=plan.row_kv_len - (np.arange(len(plan.row_len)) == 1))
    for each, equal in ((plan, True), (wrong, False)):
        out = np.full_like(full[real], np.nan)
        for index, count, call in cases.rank_calls(each, case.rows.kv_start):
            out[index[:count]] = _rank(case, target, index + cases.BEFORE, call)[:count]
        assert np.array_equal(out.view(np.uint16), full[real].view(np.uint16)) == equal


def _rank(case: Case, target: str, index: np.ndarray, rows: Rows) -> np.ndarray:
    if target in ABSORBED:
        q_latent, q_rope, pages, table = case.operands
        operands = (q_latent[:, index], q_rope[index], pages, table[rows.request])
    else:
        operands = (case.operands[0][index], *case.operands[1:])
    return dataclasses.replace(case, operands=operands, rows=rows).run(target)[0]


# Inside shard_map.


def _operands(heads: int = 2) -> tuple[np.ndarray, np.ndarray, Rows]:
    case = cases.expanded(TWO, heads)
    return *case.operands, case.rows


def _mapped(attend: Callable[..., jax.Array], rows: P, out: P) -> Callable[..., jax.Array]:
    """Heads over tp. `rows` P("cp") gives each cp rank one row."""
    mesh = make_mesh("tp=2,cp=2")
    in_specs = (P(None, "tp"), P(None, "tp"), rows)
    return jax.jit(jax.shard_map(attend, mesh=mesh, in_specs=in_specs, out_specs=out, check_vma=True))


def _attend(q: jax.Array, kv: jax.Array, rows: Rows) -> jax.Array:
    return fa3.attend_expanded(q, kv, rows, scale=0.1)


def _attend_with_plain_types(q: jax.Array, kv: jax.Array, rows: Rows) -> jax.Array:
    """A mistake that extension.call must not make: results typed by their shape alone."""
    extension.load()
    shapes = (((*q.shape[:2], VALUE), BF16), (q.shape[1::-1], np.float32), ((17,), np.int32))
    types = [jax.ShapeDtypeStruct(*shape) for shape in shapes]
    return jax.ffi.ffi_call("mla_prefill_expanded", types)(
        q, kv, rows.cu_q, rows.kv_start, rows.kv_len, scale=np.float32(0.1)
    )[0]


def _rows_over_cp() -> Rows:
    """One row for each of two ranks, different ones."""
    return Rows(*(np.asarray(x, np.int32) for x in ([0, 4, 2, 9], [9, 60], [0, 64], [0, 0])))


def test_a_result_varies_like_its_operands() -> None:
    q, kv, _ = _operands()
    rows = _rows_over_cp()
    with pytest.raises(ValueError, match="cp"):
        _mapped(_attend, P("cp"), P(None, "tp"))(q, kv, rows)
    apart = np.asarray(_mapped(_attend, P("cp"), P("cp", "tp"))(q, kv, rows)).reshape(2, *q.shape[:2], VALUE)
    assert (apart[0] != apart[1]).any(), "the ranks' results do differ"


def test_plain_result_types_would_be_accepted() -> None:
    """Negative control: the same program, if the call claimed that its result is the same everywhere."""
    q, kv, _ = _operands()
    out = _mapped(_attend_with_plain_types, P("cp"), P())(q, kv, _rows_over_cp())
    shards = [np.asarray(shard.data) for shard in out.addressable_shards]
    assert any((shard != shards[0]).any() for shard in shards), "accepted as replicated, and is not"


def test_equal_operands_give_an_equal_result() -> None:
    """Operands that vary over tp only: the result is the same on all cp ranks, and typed so."""
    q, kv, rows = _operands(heads=4)
    out = _mapped(_attend, P(), P(None, "tp"))(q, kv, rows)
    np.testing.assert_array_equal(out, _attend(q, kv, rows))
    with pytest.raises(ValueError, match="tp"):
        _mapped(_attend, P(), P())(q, kv, rows)


@pytest.mark.parametrize("target", ABSORBED)
def test_absorbed_in_shard_map(target: str) -> None:
    case = cases.absorbed(TWO, 2, 64)
    mesh = make_mesh("tp=2,cp=2")

    def attend(q_latent: jax.Array, *rest: Any) -> tuple[jax.Array, jax.Array]:
        return TARGETS[target](q_latent, *rest, scale=case.scale)

    in_specs = (P("tp"), P(None, "tp"), P(), P(), P())
    mapped = jax.jit(jax.shard_map(attend, mesh=mesh, in_specs=in_specs, out_specs=(P("tp"), P("tp")), check_vma=True))
    out, lse = mapped(*case.operands, case.rows)
    cases.check(cases.by_token(target, np.asarray(out)), np.asarray(lse), case.out, case.lse)


# Inside a program.

LAYERS, PAGES_PER_LAYER, PAGE_SIZE, HEADS, TOKENS = 3, 5, 64, 2, 12
CACHE = (LAYERS * PAGES_PER_LAYER, PAGE_SIZE, LATENT + ROPE)
STEP_ROWS = Rows(*(np.asarray(x, np.int32) for x in ([0, 8, 12], [70, 100], [0, 0], [0, 1])))
TABLE = np.asarray([[3, 0, 99], [4, 2, 99]], np.int32)
POSITIONS = np.asarray([*range(62, 70), *range(96, 100)], np.int32)  # of the rows' tokens
SLOTS = TABLE[np.repeat([0, 1], [8, 4]), POSITIONS // PAGE_SIZE] * PAGE_SIZE + POSITIONS % PAGE_SIZE


def _step(pages: jax.Array, q_latent: jax.Array, q_rope: jax.Array, latents: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Layer by layer: writes the tokens' latents, then attends to the cache."""
    pages_to_zero = jnp.asarray([CACHE[0], CACHE[0] + 1], jnp.int32)  # none: ids past the end

    def layer(pages: jax.Array, xs: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array]:
        i, q_latent, q_rope, latents = xs
        pages = cache.write(pages, latents, SLOTS, pages_to_zero, i, layers=LAYERS)
        ids = cache.layer_pages(pages, jnp.asarray(TABLE), i, layers=LAYERS)
        return pages, fa3.mla_decode(q_latent, q_rope, pages, ids, STEP_ROWS, scale=0.05)[0]

    return lax.scan(layer, pages, (jnp.arange(LAYERS), q_latent, q_rope, latents))


def _step_operands() -> tuple[jax.Array, ...]:
    shapes = (CACHE, (LAYERS, HEADS, TOKENS, LATENT), (LAYERS, TOKENS, HEADS, ROPE), (LAYERS, TOKENS, LATENT + ROPE))
    return tuple(jax.random.normal(jax.random.key(i), shape, jnp.bfloat16) for i, shape in enumerate(shapes))


def test_in_a_scan_over_layers() -> None:
    pages, q_latent, q_rope, latents = _step_operands()
    after, out = jax.jit(_step)(pages, q_latent, q_rope, latents)
    after = np.asarray(after)
    assert (after != np.asarray(pages)).any((1, 2)).sum() == 3 * LAYERS, "written pages"
    for i in range(LAYERS):
        table = TABLE + i * PAGES_PER_LAYER
        want, _ = fa3.mla_decode(q_latent[i], q_rope[i], after, table, STEP_ROWS, scale=0.05)
        np.testing.assert_array_equal(out[i], want)


def test_a_program_with_a_donated_cache_copies_nothing() -> None:
    operands = _step_operands()
    text = jax.jit(_step, donate_argnums=0).lower(*operands).compile().as_text()
    assert not cases.moves(text, CACHE, *(x.shape[1:] for x in operands[1:3]))
    assert cases.moves(jax.jit(_step).lower(*operands).compile().as_text(), CACHE), "negative control: not donated"


def test_the_expanded_call_copies_nothing() -> None:
    """Queries and keys come out of products, as in the model."""

    def attend(x: jax.Array, latents: jax.Array, w_q: jax.Array, w_kv: jax.Array, rows: Rows) -> jax.Array:
        q, kv = jnp.einsum("td,dnk->tnk", x, w_q), jnp.einsum("kc,cne->kne", latents, w_kv)
        return jnp.einsum(
            "tnv,nvd->td", fa3.attend_expanded(q, kv, rows, scale=0.1), w_kv[:VALUE, :, :32].swapaxes(0, 1)
        )

    shapes = ((11, 32), (90, 128), (32, 3, QUERY), (128, 3, QUERY + VALUE))
    operands = [jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in shapes]
    text = jax.jit(attend).lower(*operands, STEP_ROWS).compile().as_text()
    assert not cases.moves(text, (11, 3, QUERY), (90, 3, QUERY + VALUE), (11, 3, VALUE))


def test_products_around_the_absorbed_call_need_no_transpose() -> None:
    """They make and take `[n, T, R]`, as the call does. Queries token by token would be transposed."""
    heads, tokens = 3, 11

    def attend(q: jax.Array, q_rope: jax.Array, pages: jax.Array, w_uk: jax.Array, w_uv: jax.Array) -> jax.Array:
        q_latent = jnp.einsum("tnh,nhR->ntR", q, w_uk)
        return jnp.einsum(
            "ntR,nvR->tnv", fa3.attend_absorbed(q_latent, q_rope, pages, TABLE, STEP_ROWS, scale=0.1), w_uv
        )

    def by_token(q_latent: jax.Array, q_rope: jax.Array, pages: jax.Array) -> jax.Array:
        return fa3.attend_absorbed(jnp.swapaxes(q_latent, 0, 1), q_rope, pages, TABLE, STEP_ROWS, scale=0.1)

    def text(f: Callable[..., jax.Array], *shapes: tuple[int, ...]) -> str:
        return jax.jit(f).lower(*(jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in shapes)).compile().as_text()

    operands = ((tokens, heads, ROPE), CACHE)
    weights = ((heads, 128, LATENT), (heads, VALUE, LATENT))
    assert not cases.moves(text(attend, (tokens, heads, 128), *operands, *weights), (heads, tokens, LATENT))
    assert cases.moves(text(by_token, (tokens, heads, LATENT), *operands), (heads, tokens, LATENT)), "negative control"
