"""The kernels on a Hopper GPU: against float64, bit by bit against themselves, and inside programs."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from jax_mla_cp import cache
from jax_mla_cp.attention import fa3
from jax_mla_cp.batch import zigzag
from jax_mla_cp.batch.rows import Rows
from tests.ffi.test_refusals import REFUSED, refuses
from tests.ffi.test_targets import (  # noqa: F401  these run on the GPU too
    test_a_neighbor_with_nan_keys_changes_nothing,
    test_no_rows_at_all,
    test_one_key_less_fails_the_check,
    test_what_belongs_to_no_row_changes_nothing,
)
from tests.helpers import attention_cases as cases
from tests.helpers.attention_cases import ABSORBED, LATENT, QUERY, RAGGED, ROPE, TARGETS, VALUE, Case, Row

HEADS = (1, 2, 4, 8, 16, 32, 64, 128)


def also(first: int, *rows: tuple[int, int]) -> tuple[Row, ...]:
    """(queries, keys) of requests from number `first` on."""
    return tuple(Row(*row, first + i) for i, row in enumerate(rows))


# Prefixes of 0, 77 and 1000 keys; two chunks of one request, as a zigzag rank has them; a row that ends with a tile.
LONG = (
    *RAGGED,
    *also(10, (260, 260), (100, 177), (150, 1150), (1, 900)),
    Row(40, 300, 14),
    Row(45, 700, 14),
    Row(128, 384, 15),
)


@functools.cache
def long_case(form: str, heads: int, page_size: int = 64) -> Case:
    return cases.expanded(LONG, heads) if form == "expanded" else cases.absorbed(LONG, heads, page_size, seed=page_size)


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("target", TARGETS)
def test_against_float64(target: str, heads: int) -> None:
    long_case("absorbed" if target in ABSORBED else "expanded", heads).check(target)


def test_requests_that_follow_each_other_closely() -> None:
    """Keys that begin anywhere, and a last tile that ends past the array."""
    cases.expanded(LONG, 4, align=7).check("mla_prefill_expanded")
    cases.expanded(LONG, 4, align=1).check("mla_prefill_expanded")


@pytest.mark.parametrize("page_size", [64, 128, 192, 256])
@pytest.mark.parametrize("target", ABSORBED)
def test_page_sizes(target: str, page_size: int) -> None:
    long_case("absorbed", 16, page_size).check(target)


@functools.cache
def drafts_case(heads: int) -> Case:
    rows = also(0, *((n, n + 650 * (n - 1)) for n in range(1, 9)), (8, 8), (2, 20_000), (5, 64), (3, 65), (1, 1))
    return cases.absorbed(rows, heads, 64)


@pytest.mark.parametrize("heads", [1, 16, 128])
@pytest.mark.parametrize("target", ABSORBED)
def test_drafts(target: str, heads: int) -> None:
    """Rows of 1 to 8 tokens, causal within the row, over a few keys or many: a row's splits follow its length."""
    drafts_case(heads).check(target)


def test_one_row_takes_the_whole_gpu() -> None:
    for keys in (1, 63, 64, 65, 5000, 50_001):
        cases.absorbed(also(0, (1, keys)), 16, 128).check("mla_decode")


@pytest.mark.parametrize("count", [992, 993, 1024, 1025, 2500])
@pytest.mark.parametrize("target", TARGETS)
def test_many_rows(target: str, count: int) -> None:
    """FA3's scheduler sorts up to 992 rows in one block, ours (decode's) takes up to 1024."""
    rng = np.random.default_rng(count)
    queries = rng.integers(0, 4, count)
    rows = also(0, *zip(queries.tolist(), (queries + rng.integers(0, 90, count)).tolist(), strict=True))
    case = cases.absorbed(rows, 2, 64) if target in ABSORBED else cases.expanded(rows, 2, align=1)
    case.check(target)


@pytest.mark.parametrize("target", TARGETS)
def test_reruns_give_the_same_bits(target: str) -> None:
    case = long_case("absorbed" if target in ABSORBED else "expanded", 16)
    first = case.run(target)
    for _ in range(20):
        for got, want in zip(case.run(target), first, strict=True):
            np.testing.assert_array_equal(got, want)


# The zigzag: all ranks' calls on one GPU, and the same tokens in one call without it.

ZIGZAG = {
    "16 heads": (16, [16384], [0]),
    "requests": (2, [4000, 1, 9001, 5, 4097], [77, 1000, 0, 320, 1000]),
    "128 heads": (128, [4500, 3], [1000, 2000]),
}


def _bits(x: jax.Array) -> jax.Array:
    return lax.bitcast_convert_type(x, jnp.uint16)


@functools.partial(jax.jit, static_argnames="target")
def _attend(target: str, operands: tuple[jax.Array, ...], index: jax.Array, rows: Rows) -> jax.Array:
    """The output, token by token, of the queries at `index`."""
    if target in ABSORBED:
        q_latent, q_rope, pages, table = operands
        operands = (q_latent[:, index], q_rope[index], pages, table[rows.request])
    else:
        operands = (operands[0][index], *operands[1:])
    return cases.by_token(target, TARGETS[target](*operands, rows, scale=QUERY**-0.5)[0])


@jax.jit
def _differing(out: jax.Array, full: jax.Array, index: jax.Array, count: jax.Array) -> jax.Array:
    """Numbers, of the first `count` tokens, that are not the same bits."""
    mine = jnp.arange(len(index)) < count
    return ((_bits(out) != _bits(full[index])) & mine[:, None, None]).sum()


def _zigzag_operands(
    target: str, heads: int, keys: np.ndarray, tokens: int
) -> tuple[tuple[jax.Array, ...], np.ndarray]:
    """Random ones, in the sequence order, and where each request's keys begin: in `kv`, or in `pages` put one after the other."""
    size = 64 if target in ABSORBED else cases.KEY_TILE
    used = -(-keys // size)
    starts = np.cumsum(used) - used

    def random(i: int, *shape: int) -> jax.Array:
        return jax.random.normal(jax.random.key(i), shape, jnp.bfloat16)

    if target not in ABSORBED:
        return (random(0, tokens, heads, QUERY), random(1, used.sum() * size, heads, QUERY + VALUE)), starts * size
    table = np.full((len(keys), used.max()), 1 << 30, np.int32)
    order = np.random.default_rng(0).permutation(used.sum())
    for i, (first, count) in enumerate(zip(starts, used, strict=True)):
        table[i, :count] = order[first : first + count]
    pages = random(2, used.sum(), size, LATENT + ROPE)
    return (random(0, heads, tokens, LATENT), random(1, tokens, heads, ROPE), pages, jnp.asarray(table)), starts * size


@pytest.mark.parametrize("which", ZIGZAG)
@pytest.mark.parametrize("target", ["mla_prefill_expanded", "mla_prefill_absorbed"])
def test_all_ranks_equal_the_unsharded_call_bit_by_bit(target: str, which: str) -> None:
    heads, new, prefix = ZIGZAG[which]
    keys, tokens = np.add(new, prefix), sum(new)
    operands, starts = _zigzag_operands(target, heads, keys, tokens)
    arrays = (np.cumsum([0, *new]), keys, starts, np.arange(len(new)))
    rows = Rows(*(x.astype(np.int32) for x in arrays))
    full = _attend(target, operands, np.arange(tokens), rows)
    _check_some(target, operands, rows, full)
    for cp in (2, 3, 4, 8):
        plan = zigzag.plan(new, prefix, cp=cp)
        seen = np.zeros(tokens, int)
        for index, count, rows in cases.rank_calls(plan, starts):
            assert _differing(_attend(target, operands, index, rows), full, index, count) == 0
            seen[index[:count]] += 1
        assert (seen == 1).all()
    last = dataclasses.replace(rows, kv_len=rows.kv_len - (np.arange(len(rows.kv_len)) == 1))
    assert _differing(_attend(target, operands, index, last), full, index, count) > 0, "negative control: one key less"


def _check_some(target: str, operands: tuple[jax.Array, ...], rows: Rows, full: jax.Array) -> None:
    """A few queries of each row against float64."""
    for b, (first, stop) in enumerate(zip(rows.cu_q[:-1], rows.cu_q[1:], strict=True)):
        at = np.unique(np.random.default_rng(b).integers(first, stop, 4))
        keys = rows.kv_len[b]
        if target in ABSORBED:
            q_latent, q_rope, pages, table = operands
            q = np.concatenate([np.asarray(q_latent[:, at]).swapaxes(0, 1), np.asarray(q_rope[at])], axis=-1)
            k = np.asarray(pages[table[b, : -(-keys // pages.shape[1])]]).reshape(-1, LATENT + ROPE)[:keys]
            v = k[:, :LATENT]
        else:
            q, kv = np.asarray(operands[0][at]), np.asarray(operands[1][rows.kv_start[b] :][:keys])
            k, v = np.split(kv, [QUERY], axis=2)
        want, want_lse = cases.brute_force(q, k, v, keys - (stop - 1 - at), QUERY**-0.5)
        cases.check(np.asarray(full[at]), want_lse.astype(np.float32), want, want_lse)


# Inside programs.

LAYERS, TOKENS, N, PAGE_SIZE, PAGES_PER_LAYER, WIDTH = 4, 96, 16, 64, 40, 12
CACHE = (LAYERS * PAGES_PER_LAYER, PAGE_SIZE, LATENT + ROPE)


@functools.partial(jax.jit, donate_argnums=0)
def _step(pages: jax.Array, xs: Any, slots: jax.Array, table: jax.Array, rows: Rows) -> tuple[jax.Array, Any]:
    """Layer by layer: writes latents, then calls every target."""

    def layer(pages: jax.Array, x: Any) -> tuple[jax.Array, Any]:
        i, latents, q, kv, q_latent, q_rope = x
        pages_to_zero = jnp.asarray([CACHE[0], CACHE[0] + 1], jnp.int32)  # none: ids past the end
        pages = cache.write(pages, latents, slots, pages_to_zero, i, layers=LAYERS)
        ids = cache.layer_pages(pages, table, i, layers=LAYERS)
        return pages, (
            fa3.mla_prefill_expanded(q, kv, rows, scale=0.1)[0],
            fa3.mla_prefill_absorbed(q_latent, q_rope, pages, ids, rows, scale=0.05)[0],
            fa3.mla_decode(q_latent, q_rope, pages, ids, rows, scale=0.05)[0],
        )

    return lax.scan(layer, pages, (jnp.arange(LAYERS), *xs))


def _step_operands(seed: int) -> tuple[jax.Array, ...]:
    shapes = (
        (LAYERS, TOKENS, LATENT + ROPE),
        (LAYERS, TOKENS, N, QUERY),
        (LAYERS, 900, N, QUERY + VALUE),
        (LAYERS, N, TOKENS, LATENT),
        (LAYERS, TOKENS, N, ROPE),
    )
    keys = jax.random.split(jax.random.key(seed), len(shapes))
    return tuple(jax.random.normal(key, shape, jnp.bfloat16) for key, shape in zip(keys, shapes, strict=True))


def _changing_rows(rng: np.random.Generator) -> tuple[Rows, np.ndarray, np.ndarray]:
    """Rows, slots to write to and a page table, of always the same shapes."""
    cuts = np.sort(rng.integers(0, TOKENS + 1, 6))
    length = np.diff(cuts)
    kv_len = length + rng.integers(0, WIDTH * PAGE_SIZE - TOKENS, 5)
    table = np.stack([rng.permutation(PAGES_PER_LAYER)[:WIDTH] for _ in range(5)])
    arrays = (cuts, kv_len, rng.integers(0, 900 - kv_len), np.zeros(5))
    slots = rng.permutation(PAGES_PER_LAYER * PAGE_SIZE)[:TOKENS]
    return Rows(*(x.astype(np.int32) for x in arrays)), slots.astype(np.int32), table.astype(np.int32)


def test_one_program_replayed_with_other_lengths() -> None:
    """XLA records the calls into command buffers, as it does by default, and replays them: nothing of a step may stick."""
    rng = np.random.default_rng(0)
    pages = jax.random.normal(jax.random.key(99), CACHE, jnp.bfloat16)
    inputs = [_step_operands(0), _step_operands(1)]
    compiled = None
    for i in range(8):
        xs, (rows, slots, table) = inputs[i % 2], _changing_rows(rng)
        if compiled is None:
            compiled = _step.lower(pages, xs, slots, table, rows).compile()
        pages, outs = compiled(pages, xs, slots, table, rows)
        for layer in range(LAYERS):
            _, q, kv, q_latent, q_rope = (x[layer] for x in xs)
            absorbed = (q_latent, q_rope, pages, table + layer * PAGES_PER_LAYER, rows)
            want = (
                TARGETS["mla_prefill_expanded"](q, kv, rows, scale=0.1)[0],
                TARGETS["mla_prefill_absorbed"](*absorbed, scale=0.05)[0],
                TARGETS["mla_decode"](*absorbed, scale=0.05)[0],
            )
            for out, alone in zip(outs, want, strict=True):
                np.testing.assert_array_equal(np.asarray(out[layer]), np.asarray(alone))


def test_a_program_with_a_donated_cache_copies_nothing() -> None:
    rows, slots, table = _changing_rows(np.random.default_rng(0))
    xs = jax.eval_shape(lambda: _step_operands(0))
    text = _step.lower(jax.ShapeDtypeStruct(CACHE, jnp.bfloat16), xs, slots, table, rows).compile().as_text()
    assert all(target in text for target in TARGETS)
    assert not cases.moves(text, CACHE)  # the layers' queries and keys are slices here; of products, see below


def _text(f: Callable[..., jax.Array], *shapes: tuple[int, ...]) -> str:
    return jax.jit(f).lower(*(jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in shapes)).compile().as_text()


def test_products_around_the_expanded_call_need_no_copy() -> None:
    """As in the model: queries and keys come out of products, the output goes into one."""
    tokens, heads, keys = 1536, 16, 3328
    rows = Rows(*(np.asarray(x, np.int32) for x in ([0, 700, 1500], [700, 3000], [0, 0], [0, 0])))

    def attend(x: jax.Array, latents: jax.Array, w_q: jax.Array, w_kv: jax.Array, w_o: jax.Array) -> jax.Array:
        q, kv = jnp.einsum("td,dnk->tnk", x, w_q), jnp.einsum("kc,cne->kne", latents, w_kv)
        return jnp.einsum("tnv,nvd->td", fa3.attend_expanded(q, kv, rows, scale=0.1), w_o)

    width = QUERY + VALUE
    text = _text(
        attend, (tokens, 1024), (keys, LATENT), (1024, heads, QUERY), (LATENT, heads, width), (heads, VALUE, 1024)
    )
    assert "mla_prefill_expanded" in text
    assert not cases.moves(text, (tokens, heads, QUERY), (keys, heads, width), (tokens, heads, VALUE))


@pytest.mark.parametrize("first", ["tnh,nhR->tnR", "tnh,nhR->ntR"])
@pytest.mark.parametrize("tokens", [96, 1536])  # mla_decode, mla_prefill_absorbed
def test_products_around_the_absorbed_call_need_no_copy(tokens: int, first: str) -> None:
    """The call takes and gives [n, T, R]; XLA writes the first product so, whichever form it has in JAX."""
    heads = 16
    rows, _, table = _changing_rows(np.random.default_rng(0))

    def attend(q: jax.Array, q_rope: jax.Array, w_uk: jax.Array, w_uv: jax.Array, pages: jax.Array) -> jax.Array:
        q_latent = jnp.einsum(first, q, w_uk)
        q_latent = jnp.swapaxes(q_latent, 0, 1) if first.endswith("tnR") else q_latent
        return jnp.einsum("ntR,nvR->tnv", fa3.attend_absorbed(q_latent, q_rope, pages, table, rows, scale=0.1), w_uv)

    text = _text(
        attend, (tokens, heads, 128), (tokens, heads, ROPE), (heads, 128, LATENT), (heads, VALUE, LATENT), CACHE
    )
    assert ("mla_decode" if tokens == 96 else "mla_prefill_absorbed") in text
    assert not cases.moves(text, (heads, tokens, LATENT), CACHE)


@pytest.mark.parametrize("what", REFUSED)
def test_refuses(what: str) -> None:
    refuses(*REFUSED[what])
    long_case("expanded", 2).check("mla_prefill_expanded")  # an error leaves the GPU usable
