"""The few-row kernel (ffi/few_rows/) on a Hopper GPU against float64, over formats, sizes and groups."""

from __future__ import annotations

import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from jax_mla_cp.model.few_rows import few_rows_matmul, fits
from jax_mla_cp.model.fp8 import Matrices, ScaledMatrices, take_matrices

Kind = Literal["bf16", "fp8", "int4"]
BF16 = np.dtype(ml_dtypes.bfloat16)
UNIT = 2.0**-8  # half a unit in the last place of a bfloat16 result, relative
FIRST = 2  # the matrix of group 0; those before and behind must not be used


def make_weights(kind: Kind, count: int, n: int, k: int) -> tuple[Matrices, np.ndarray]:
    """Random matrices [count, n, k], and their exact values in float64."""
    rng = np.random.default_rng(1)
    if kind == "bf16":
        plain = rng.normal(size=(count, n, k)).astype(BF16)
        return jnp.asarray(plain), plain.astype(np.float64)
    block = (128, 128) if kind == "fp8" else (1, 32)
    if kind == "fp8":
        q = rng.normal(size=(count, n, k), scale=60).clip(-448, 448).astype(ml_dtypes.float8_e4m3fn)
        q.reshape(-1)[::7] = rng.choice([2.0**-9, -(2.0**-8), 0.0, 448.0], q.reshape(-1)[::7].shape)  # subnormals, ends
    else:
        q = rng.integers(-8, 8, (count, n, k)).astype(ml_dtypes.float8_e4m3fn)
    scale_shape = (count, *(-(-size // b) for size, b in zip((n, k), block, strict=True)))
    scale = rng.uniform(0.5, 2, scale_shape).astype(np.float32 if kind == "fp8" else BF16)
    wide = scale.astype(np.float64)
    for dim, b in enumerate(block, start=1):
        wide = np.repeat(wide, b, axis=dim)
    exact = q.astype(np.float64) * wide[:, :n, :k]
    weights = ScaledMatrices(jnp.asarray(q.view(np.uint8)), jnp.asarray(scale), block, np.dtype(BF16))
    return weights, exact


@functools.partial(jax.jit, static_argnames="expected_rows")
def multiply(rows: jax.Array, weights: Matrices, sizes: jax.Array, first: jax.Array, expected_rows: int) -> jax.Array:
    return few_rows_matmul(rows, weights, sizes, first, expected_rows)


def reference(rows: np.ndarray, exact: np.ndarray, sizes: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """The product in float64, and the sum of its terms' magnitudes: the scale of float32's rounding."""
    wide = rows.astype(np.float64)
    group = np.repeat(np.arange(len(sizes)), sizes)
    parts = [wide[group == e] @ exact[FIRST + e].T for e in range(len(sizes))]
    bounds = [np.abs(wide[group == e]) @ np.abs(exact[FIRST + e]).T for e in range(len(sizes))]
    return np.concatenate(parts), np.concatenate(bounds)


def check(kind: Kind, sizes: list[int], n: int, k: int, expected_rows: int) -> None:
    used = sum(sizes)
    rows = np.random.default_rng(2).normal(size=(used + 9, k)).astype(BF16)
    rows[used:] = np.nan  # rows of no group
    weights, exact = make_weights(kind, len(sizes) + FIRST + 1, n, k)
    arguments: tuple[Any, ...] = (jnp.asarray(rows), weights, jnp.array(sizes, jnp.int32), jnp.int32(FIRST))
    assert fits(weights, len(sizes))
    out = np.asarray(multiply(*arguments, expected_rows))
    again = np.asarray(multiply(*arguments, expected_rows))
    np.testing.assert_array_equal(out[:used].view(np.uint16), again[:used].view(np.uint16))
    if not used:
        return
    want, bound = reference(rows[:used], exact, sizes)
    # The result's own rounding, and that of k float32 additions; a 4-bit weight is also rounded to bfloat16 once.
    slack = UNIT * np.abs(want) + k * 2.0**-24 * bound + (UNIT * bound if kind == "int4" else 0)
    error = np.abs(out[:used].astype(np.float64) - want)
    assert (error <= slack).all(), f"worst: {(error / slack).max()} of what is allowed"
    assert (np.abs(np.roll(out[:used].astype(np.float64), 1, axis=1) - want) > slack).mean() > 0.9, (
        "other outputs are other"
    )


@pytest.mark.parametrize("kind", ["bf16", "fp8", "int4"])
@pytest.mark.parametrize("expected_rows", [1, 40, 1000])  # tiles of 8, 32 and 128 rows
@pytest.mark.parametrize(
    "sizes",
    [[3, 0, 1, 40, 7], [0, 0, 0, 0, 0], [0, 300, 0, 0, 0], [1, 1, 1, 1, 1], [8, 16, 32, 128, 129], [0, 0, 0, 0, 1]],
)
def test_groups(kind: Kind, expected_rows: int, sizes: list[int]) -> None:
    check(kind, sizes, 384, 1024, expected_rows)


@pytest.mark.parametrize("kind", ["bf16", "fp8"])
@pytest.mark.parametrize(("n", "k"), [(200, 448), (8, 64), (1280, 192), (72, 7168)])
def test_sizes_that_tiles_do_not_divide(kind: Kind, n: int, k: int) -> None:
    check(kind, [5, 0, 70], n, k, 75)


@pytest.mark.parametrize("kind", ["bf16", "fp8", "int4"])
@pytest.mark.parametrize("rows", [1, 8, 33, 64, 100, 128, 500])
def test_one_group(kind: Kind, rows: int) -> None:
    """Its inputs are divided over clusters: 1536 outputs of V3's q_a are 24 tiles for 132 multiprocessors."""
    check(kind, [rows], 1536, 2048, rows)


@pytest.mark.parametrize(("n", "k"), [(576, 7168), (576, 5184), (64, 7168)])
@pytest.mark.parametrize("rows", [3, 40, 128])
def test_clusters_of_eight(rows: int, n: int, k: int) -> None:
    """With a rest of outputs, and with 41 blocks of inputs, which eight don't divide and of which the last is half."""
    check("fp8", [rows], n, k, rows)


@pytest.mark.parametrize("kind", ["bf16", "fp8"])
@pytest.mark.parametrize("expected_rows", [3, 60, 1000])
def test_several_tiles_of_a_multiprocessor(kind: Kind, expected_rows: int) -> None:
    """Its ring of stages goes on between tiles, of more stages than the ring has: they once wrote behind it."""
    check(kind, [200, 5, 100], 8192, 2048, expected_rows)


def test_many_groups() -> None:
    """Kimi K2's 384 experts, most of them empty."""
    sizes = np.bincount(np.random.default_rng(3).integers(0, 384, 200), minlength=384).tolist()
    check("fp8", sizes, 256, 256, 200)


def test_error_is_not_larger_than_of_dequantized_weights() -> None:
    weights, exact = make_weights("fp8", 4, 1024, 7168)
    assert isinstance(weights, ScaledMatrices)
    rows = np.random.default_rng(4).normal(size=(4, 7168)).astype(BF16)
    sizes, first = jnp.array([4], jnp.int32), jnp.int32(FIRST)
    want, _ = reference(rows, exact, [4])

    def error(matrices: Matrices) -> float:
        out = np.asarray(multiply(jnp.asarray(rows), matrices, sizes, first, 4)).astype(np.float64)
        return float(np.linalg.norm(out - want) / np.linalg.norm(want))

    assert error(weights) < error(take_matrices(weights, 0, 4)), (
        "scales are applied to sums, not rounded into the weights"
    )


def test_refusals_name_the_argument() -> None:
    weights, _ = make_weights("fp8", 4, 256, 256)
    assert isinstance(weights, ScaledMatrices)
    rows, sizes = jnp.zeros((4, 256), jnp.bfloat16), jnp.array([4], jnp.int32)
    scales = ScaledMatrices(weights.q, weights.scale[:, :1], weights.block, weights.dtype)
    with pytest.raises(jax.errors.JaxRuntimeError, match=r"few_rows_scaled: scales: expected float32\[4, 2, 2\]"):
        multiply(rows, scales, sizes, jnp.int32(0), 4).block_until_ready()
    with pytest.raises(jax.errors.JaxRuntimeError, match=r"few_rows: weights: expected bfloat16"):
        multiply(rows, jnp.zeros((4, 256, 256), jnp.float32), sizes, jnp.int32(0), 4).block_until_ready()
    assert not fits(jnp.zeros((4, 256, 256), jnp.float32), 1)
