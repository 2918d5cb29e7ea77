"""The grouped product against a loop, with any sizes; the Hopper kernel in Pallas's interpreter, and its lowering."""

from __future__ import annotations

import functools
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks
from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams, force_gpu_interpret_mode
from jax._src.state.types import TransposeTransform
from jax.sharding import PartitionSpec as P

from jax_mla_cp import extension
from jax_mla_cp.mesh import make_mesh
from jax_mla_cp.model import many_rows
from jax_mla_cp.model.experts import apply_experts
from jax_mla_cp.model.fp8 import ScaledMatrices, fp8_bytes, take_matrices
from jax_mla_cp.model.grouped_matmul import GroupedMatmul, group_alignment, grouped_matmul, resolve_grouped_matmul
from jax_mla_cp.model.many_rows import many_rows_matmul

run = jax.jit(functools.partial(grouped_matmul, implementation="blocks"))


@given(st.lists(st.integers(0, 90), min_size=4, max_size=4), st.integers(0, 300))
@settings(max_examples=40, deadline=None)
def test_grouped_matmul(sizes: list[int], seed: int) -> None:
    rng = np.random.default_rng(seed)
    rows, weights = rng.normal(size=(360, 6)).astype(np.float32), rng.normal(size=(4, 5, 6)).astype(np.float32)
    out = np.asarray(run(rows, weights, jnp.array(sizes, jnp.int32)))
    ends = np.cumsum(sizes)
    for e, end in enumerate(ends):
        part = slice(end - sizes[e], end)
        np.testing.assert_allclose(out[part], rows[part].astype(np.float64) @ weights[e].T, atol=1e-5)
    assert not out[ends[-1] :].any(), "rows of no group are zero"


def test_agrees_with_ragged_dot() -> None:
    """The product on other devices than CPUs gives the same."""
    rng = np.random.default_rng(1)
    rows, weights = rng.normal(size=(64, 6)).astype(np.float32), rng.normal(size=(4, 5, 6)).astype(np.float32)
    sizes = jnp.array([10, 0, 50, 4], jnp.int32)
    want = lax.ragged_dot(rows, weights.swapaxes(1, 2), sizes)
    for implementation in ("blocks", "ragged"):
        got = grouped_matmul(rows, weights, sizes, implementation=implementation)
        np.testing.assert_allclose(got, want, atol=1e-5)


# A tile of two groups, tiles of one, a group over tiles. The interpreter takes its time: tests/gpu has more.
GROUPS = [[70, 0, 190, 20], [0, 129, 126, 1], [0, 0, 0, 0]]


class TransposedWeights:
    """NumPy, as JAX 0.10's interpreter sees it: it can't transpose a reference, so its product transposes the weights."""

    def __getattr__(self, name: str) -> Any:
        return getattr(np, name)

    def matmul(self, a: np.ndarray, b: np.ndarray, dtype: np.dtype) -> np.ndarray:
        return np.matmul(a, b.T, dtype=dtype)


def interpreted(function, *args):  # type: ignore[no-untyped-def]
    """The result of a function that calls the kernel. What the kernel doesn't write is NaN."""
    with pytest.MonkeyPatch.context() as patch, force_gpu_interpret_mode(InterpretGPUParams()):
        patch.setattr(many_rows, "_SMS", 4)  # the interpreter has three threads for each, and they take turns
        plain = gpu_callbacks._remove_noop_transforms
        kept = lambda transforms: tuple(t for t in plain(transforms) if not isinstance(t, TransposeTransform))  # noqa: E731
        patch.setattr(gpu_callbacks, "_remove_noop_transforms", kept)
        patch.setattr(gpu_callbacks, "np", TransposedWeights())
        return np.asarray(jax.block_until_ready(function(*args)), np.float64)


def random_bfloat16(*shapes: tuple[int, ...]) -> list[jax.Array]:
    rng = np.random.default_rng(1)
    return [jnp.asarray(rng.normal(size=s), jnp.bfloat16) for s in shapes]


@pytest.mark.parametrize("sizes", GROUPS)
def test_many_rows(sizes: list[int]) -> None:
    rows, weights = random_bfloat16((384, 320), (4, 512, 320))  # 5 steps a tile, and buffers for 4
    used, ends = sum(sizes), np.cumsum(sizes)
    out = interpreted(many_rows_matmul, rows.at[used:].set(jnp.nan), weights, jnp.array(sizes, jnp.int32))
    wide, wide_weights = np.asarray(rows, np.float64), np.asarray(weights, np.float64)
    for e, end in enumerate(ends):
        part = slice(end - sizes[e], end)
        np.testing.assert_allclose(out[part], wide[part] @ wide_weights[e].T, rtol=2**-8, atol=1e-2)
    assert np.isnan(out[used:]).all(), "rows past the groups are not written: callers must select"


def test_many_rows_are_padded() -> None:
    multiply = functools.partial(grouped_matmul, implementation="pallas")
    rows, weights = random_bfloat16((72, 64), (3, 128, 64))
    sizes = jnp.array([30, 1, 20], jnp.int32)
    out = interpreted(multiply, rows, weights, sizes)
    assert out.shape == (72, 128)
    plain = functools.partial(grouped_matmul, implementation="ragged")
    np.testing.assert_allclose(out[:51], np.asarray(plain(rows, weights, sizes), np.float64)[:51], rtol=2**-7)
    # Other sizes and types are XLA's to multiply.
    few = rows[:, :6], weights[..., :6], sizes
    np.testing.assert_array_equal(multiply(*few), plain(*few))


@pytest.mark.parametrize("tokens", [20, 150])
def test_experts_through_pallas(tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Groups of many rows begin at tiles, groups of few do not; nothing that was not written is read."""
    x, gate_up, down = random_bfloat16((tokens, 128), (4, 128, 128), (4, 128, 64))
    rng = np.random.default_rng(2)
    expert = jnp.asarray(np.sort([rng.permutation(8)[:4] for _ in range(tokens)], -1) - 2, jnp.int32)
    weight = jnp.asarray(rng.uniform(0.1, 1, (tokens, 4)), jnp.float32)
    assert group_alignment(gate_up, tokens * 4, 4, "pallas") == (128 if tokens == 150 else 1)
    arrays = (x, expert, weight, gate_up, down)
    run = functools.partial(apply_experts, *arrays, num_experts=4, first=0, ep_size=1)
    through_pallas = functools.partial(run, implementation="pallas")
    whole = interpreted(through_pallas)
    monkeypatch.setattr("jax_mla_cp.model.experts.window_rows", lambda *_: 256)
    np.testing.assert_array_equal(interpreted(through_pallas), whole)
    monkeypatch.undo()
    plain = np.asarray(run(implementation="blocks"), np.float64)
    np.testing.assert_allclose(whole, plain, atol=2**-6 * np.abs(plain).max())
    assert np.abs(plain[::2] - whole[1::2]).max() > 0.1 * np.abs(plain).max(), "other tokens have other results"


@pytest.mark.parametrize(
    ("experts", "m", "k", "n"), [(32, 40960, 7168, 4096), (32, 40960, 2048, 7168), (384, 128, 7168, 4096)]
)
def test_many_rows_lower_for_cuda(experts: int, m: int, k: int, n: int) -> None:
    """DeepSeek-V3's and Kimi K2's sizes, as far as a machine without a GPU gets: to Mosaic, under shard_map's types."""
    types = []

    def device(rows: jax.Array, weights: jax.Array, sizes: jax.Array) -> jax.Array:
        out = many_rows_matmul(rows, weights, sizes)
        types.append(jax.typeof(out).manual_axis_type.varying)
        return out

    tp = P("tp")
    sharded = jax.shard_map(device, mesh=make_mesh("tp=2"), in_specs=(P(), tp, tp), out_specs=tp)
    shapes = [((m, k), jnp.bfloat16), ((2 * experts, n, k), jnp.bfloat16), ((2 * experts,), jnp.int32)]
    traced = jax.jit(sharded).trace(*(jax.ShapeDtypeStruct(*s) for s in shapes))
    assert types == [{"tp"}]
    assert "mosaic_gpu" in traced.lower(lowering_platforms=("cuda",)).as_text()


def test_elsewhere() -> None:
    """On devices that are neither CPUs nor Hopper GPUs: the stack's own part, in one group or in many."""
    rows, weights = random_bfloat16((40, 64), (6, 128, 64))
    for sizes in (jnp.array([33], jnp.int32), jnp.array([9, 0, 24], jnp.int32)):
        got, want = (
            np.asarray(grouped_matmul(rows, weights, sizes, jnp.int32(2), implementation=name), np.float32)[:33]
            for name in ("ragged", "blocks")
        )
        np.testing.assert_allclose(got, want, rtol=2**-7, atol=1e-2)


@pytest.mark.parametrize("implementation", ["blocks", "ragged", "pallas"])
@pytest.mark.parametrize("sizes", [[9, 0, 20], [29], None])
def test_matrices_in_fp8(implementation: GroupedMatmul, sizes: list[int] | None) -> None:
    """As dequantized before, with blocks that end within the matrix, from a stack of layers; another layer's are others."""
    rng = np.random.default_rng(3)
    q = fp8_bytes(jnp.asarray(rng.normal(size=(6, 20, 36)), jnp.float32))
    scale = jnp.asarray(rng.uniform(0.5, 2, size=(6, 3, 3)), jnp.float32)
    matrices = ScaledMatrices(q, scale, (8, 16), np.dtype(np.float32))
    by_element = np.repeat(np.repeat(scale, 8, axis=1), 16, axis=2)[:, :20, :36]
    plain = jnp.asarray(np.asarray(q).view(ml_dtypes.float8_e4m3fn).astype(np.float32) * by_element)
    np.testing.assert_array_equal(take_matrices(matrices, 0, 6), plain)
    rows, groups = rng.normal(size=(29, 36)).astype(np.float32), None if sizes is None else jnp.array(sizes, jnp.int32)
    multiply = jax.jit(functools.partial(grouped_matmul, implementation=implementation))
    want = np.zeros((29, 20))
    for e, rows_of in enumerate(np.split(np.arange(29), np.cumsum(sizes or [29])[:-1])):
        want[rows_of] = rows[rows_of].astype(np.float64) @ np.asarray(plain[2 + e], np.float64).T
    for weights in (matrices, plain):
        np.testing.assert_allclose(multiply(rows, weights, groups, 2), want, atol=1e-4)
    assert np.abs(np.asarray(multiply(rows, matrices, groups, 1)) - want).max() > 1


@pytest.mark.parametrize(
    ("platform", "capability", "problem", "resolved"),
    [
        ("cpu", None, None, "blocks"),
        ("gpu", "9.0", None, "hopper"),
        ("gpu", "9.0", "built without CUDA", "pallas"),
        ("gpu", "8.0", None, "ragged"),
        ("tpu", None, None, "ragged"),
    ],
)
def test_resolved_from_the_device(
    platform: str, capability: str | None, problem: str | None, resolved: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(extension, "cuda_problem", lambda: problem)
    device = SimpleNamespace(platform=platform, **({} if capability is None else {"compute_capability": capability}))
    monkeypatch.setattr(jax, "devices", lambda: [device])
    assert resolve_grouped_matmul() == resolved


def test_groups_from_the_first_on() -> None:
    """The weights of a stack of layers, of which a layer has its own."""
    rows, weights = random_bfloat16((40, 64), (6, 128, 64))
    sizes = jnp.array([9, 0, 31], jnp.int32)
    expect = np.asarray(run(rows, weights[2:5], sizes), np.float32)
    np.testing.assert_array_equal(np.asarray(run(rows, weights, sizes, jnp.int32(2)), np.float32), expect)
    assert (np.asarray(run(rows, weights, sizes, jnp.int32(1)), np.float32) != expect).any()
