"""XLA attention, both forms, against brute force in float64; its memory; what stale memory can't do."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_mla_cp.attention import attend_absorbed, attend_expanded, resolve_implementation
from jax_mla_cp.batch.rows import Rows
from jax_mla_cp.config.errors import ConfigError
from jax_mla_cp.config.presets import model_config

N, H, ROPE, V, RANK = 2, 16, 8, 12, 24

# (queries, keys) of each row: long ones, short ones, an empty one, a decode token, and a row that is its whole request.
ROWS = [(130, 700), (0, 5), (1, 513), (3, 3), (4, 100), (260, 260), (1, 1)]


def brute_force(q: np.ndarray, k: np.ndarray, v: np.ndarray, kv_len: int, scale: float) -> np.ndarray:
    """[L, n, d], [S, n, d], [S, n, v] -> [L, n, v] in float64: query j of L sees keys up to kv_len - L + j."""
    q, k, v = (x.astype(np.float64) for x in (q, k[:kv_len], v[:kv_len]))
    s = np.einsum("qnd,knd->nqk", q, k) * scale
    s[:, np.arange(kv_len)[None] > kv_len - len(q) + np.arange(len(q))[:, None]] = -np.inf
    p = np.exp(s - s.max(-1, keepdims=True))
    return np.einsum("nqk,knv->qnv", p / p.sum(-1, keepdims=True), v)


def make_rows(first: int, kv_start: list[int]) -> Rows:
    cu_q = first + np.concatenate([[0], np.cumsum([q for q, _ in ROWS])])
    return Rows(*(jnp.asarray(x, jnp.int32) for x in (cu_q, [k for _, k in ROWS], kv_start, range(len(ROWS)))))


@pytest.fixture(scope="module")
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


def test_expanded(rng: np.random.Generator) -> None:
    starts = np.concatenate([[0], np.cumsum([k + 7 for _, k in ROWS])])  # gaps of 7 keys
    tokens = 5 + sum(q for q, _ in ROWS) + 9  # rows begin after 5 foreign tokens; 9 are padding
    q = rng.normal(size=(tokens, N, H)).astype(np.float32)
    kv = np.full((starts[-1], N, H + V), np.nan, np.float32)
    for start, (_, keys) in zip(starts, ROWS, strict=False):
        kv[start : start + keys] = rng.normal(size=(keys, N, H + V))
    k, v = kv[..., :H], kv[..., H:]
    rows = make_rows(5, list(starts[:-1]))
    out = np.asarray(jax.jit(lambda *a: attend_expanded(*a, scale=0.3))(q, kv, rows))
    at = 5
    for start, (queries, keys) in zip(starts, ROWS, strict=False):
        if queries:
            expect = brute_force(q[at : at + queries], k[start:], v[start:], keys, 0.3)
            np.testing.assert_allclose(out[at : at + queries], expect, atol=2e-6)
            if keys > queries:
                wrong = brute_force(q[at : at + queries], k[start:], v[start:], keys - 1, 0.3)[-1]
                assert np.abs(out[at + queries - 1] - wrong).max() > 1e-4, "one key less must show"
        at += queries
    assert not out[:5].any() and not out[at:].any(), "tokens of no row are zero"


@pytest.mark.parametrize("page_size", [1, 16, 48, 1024])
def test_absorbed(rng: np.random.Generator, page_size: int) -> None:
    tokens = sum(q for q, _ in ROWS) + 3
    q = rng.normal(size=(tokens, N, RANK + ROPE)).astype(np.float32)
    used = [-(-keys // page_size) for _, keys in ROWS]
    ids = rng.permutation(sum(used) + 4)
    pages = np.full((len(ids), page_size, RANK + ROPE), np.nan, np.float32)
    table = np.full((len(ROWS), max(used) + 1), len(ids) + 99)  # past a row's pages: out of range
    latents = []
    for b, (_, keys) in enumerate(ROWS):
        table[b, : used[b]] = ids[sum(used[:b]) :][: used[b]]
        latents.append(rng.normal(size=(keys, RANK + ROPE)).astype(np.float32))
        for t in range(keys):
            pages[table[b, t // page_size], t % page_size] = latents[b][t]
    run = jax.jit(lambda q, *a: attend_absorbed(q[..., :RANK].swapaxes(0, 1), q[..., RANK:], *a, scale=0.2))
    out = np.asarray(run(q, pages, table.astype(np.int32), make_rows(0, [0] * len(ROWS)))).swapaxes(0, 1)
    at = 0
    for (queries, keys), latent in zip(ROWS, latents, strict=True):
        shared = np.broadcast_to(latent[:, None], (keys, N, RANK + ROPE))
        if queries:
            expect = brute_force(q[at : at + queries], shared, shared[..., :RANK], keys, 0.2)
            np.testing.assert_allclose(out[at : at + queries], expect, atol=2e-6)
        at += queries
    assert not out[at:].any()


def test_bfloat16_stays_close(rng: np.random.Generator) -> None:
    q, kv = (jnp.asarray(rng.normal(size=(300, N, d)), jnp.bfloat16) for d in (H, H + V))
    rows = Rows(*(jnp.array(x, jnp.int32) for x in ([0, 300], [300], [0], [0])))
    out = attend_expanded(q, kv, rows, scale=0.25)
    expect = brute_force(*(np.asarray(x, np.float32) for x in (q, kv[..., :H], kv[..., H:])), 300, 0.25)
    assert out.dtype == jnp.bfloat16
    assert np.linalg.norm(np.asarray(out, np.float64) - expect) / np.linalg.norm(expect) < 5e-3


@pytest.mark.parametrize("form", ["expanded", "absorbed"])
def test_memory_grows_linearly(form: str) -> None:
    """Temporaries at 32K tokens and 4 heads: four times those at 8K, where a square array would take sixteen times."""

    def temporaries(tokens: int) -> int:
        rows = Rows(*(jax.ShapeDtypeStruct(s, jnp.int32) for s in ((3,), (2,), (2,), (2,))))

        def array(*shape: int, dtype: type = jnp.float32) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct(shape, dtype)

        if form == "expanded":
            args = (array(tokens, 4, 192), array(tokens, 4, 320), rows)
            lowered = jax.jit(lambda *a: attend_expanded(*a, scale=1.0)).lower(*args)
        else:
            args = (
                array(4, tokens, 512),
                array(tokens, 4, 64),
                array(tokens // 64, 64, 576),
                array(2, tokens // 64, dtype=jnp.int32),
                rows,
            )
            lowered = jax.jit(lambda *a: attend_absorbed(*a, scale=1.0)).lower(*args)
        return lowered.compile().memory_analysis().temp_size_in_bytes

    small, large = temporaries(8192), temporaries(32768)
    assert large <= 4.1 * small
    assert large < 32768 * 32768, "far from an S x S array"


def test_fa3_says_what_is_missing() -> None:
    """By name when it is asked for; "auto" takes XLA."""
    config = model_config("deepseek_v3")
    with pytest.raises(
        ConfigError, match=r"attention: fa3 can't run: its kernels need a Hopper GPU, JAX runs on cpu.*xla"
    ):
        resolve_implementation("fa3", config, jnp.bfloat16)
    assert resolve_implementation("auto", config, jnp.bfloat16) == "xla"
