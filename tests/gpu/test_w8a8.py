"""The kernel of rows and matrices in FP8 (ffi/w8a8/) on a Hopper GPU against float64, over sizes and groups."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from jax_mla_cp.model.fp8 import ScaledMatrices
from jax_mla_cp.model.fp8_rows import ScaledRows, dequantize_rows, quantize_rows
from jax_mla_cp.model.grouped_matmul import grouped_matmul
from jax_mla_cp.model.quantize import quantize, quantize_gated
from jax_mla_cp.model.w8a8 import fits, w8a8_matmul

E4M3 = np.dtype(ml_dtypes.float8_e4m3fn)
BF16 = np.dtype(ml_dtypes.bfloat16)
UNIT = 2.0**-8  # half a unit in the last place of a bfloat16 result, relative
# Of the tensor cores' sums of FP8 products, relative to the sum of their magnitudes. They keep 14 bits of the largest
# (DeepSeek-V3, arXiv:2412.19437, section 3.3.2), and cut each of the others off there: 2^-13 if one did, 33 times that if all did
# the most. Seen: 1.01 * 2^-12.
TENSOR_CORE = 2.0**-11
FIRST = 2  # the matrix of group 0; those before and behind must not be used

multiply = jax.jit(w8a8_matmul)


def random_e4m3(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    q = rng.normal(size=shape, scale=60).clip(-448, 448).astype(E4M3)
    q.reshape(-1)[::7] = rng.choice([2.0**-9, -(2.0**-8), 0.0, 448.0], q.reshape(-1)[::7].shape)  # subnormals, ends
    return q


def by_element(scale: np.ndarray, n: int, k: int) -> np.ndarray:
    """Scales of blocks of 128 x 128, or of a row's 128 columns, for each element."""
    wide = np.repeat(scale.astype(np.float64), 128, axis=-1)[..., :k]
    return wide if scale.ndim == 2 else np.repeat(wide, 128, axis=1)[:, :n]


def check(sizes: list[int], n: int, k: int) -> None:
    rng = np.random.default_rng(1)
    used, count = sum(sizes), len(sizes) + FIRST + 1
    q, scale = random_e4m3(rng, (used + 9, k)), rng.uniform(0.5, 2, (used + 9, -(-k // 128))).astype(np.float32)
    q[used:], scale[used:] = np.nan, np.nan  # rows of no group
    weights = random_e4m3(rng, (count, n, k))
    scales = rng.uniform(0.5, 2, (count, -(-n // 128), -(-k // 128))).astype(np.float32)
    rows = ScaledRows(jnp.asarray(q.view(np.uint8)), jnp.asarray(scale))
    matrices = ScaledMatrices(jnp.asarray(weights.view(np.uint8)), jnp.asarray(scales), (128, 128), BF16)
    assert fits(matrices)
    arguments = rows, matrices, jnp.array(sizes, jnp.int32), jnp.int32(FIRST)
    out, again = (np.asarray(multiply(*arguments)) for _ in range(2))
    np.testing.assert_array_equal(out[:used].view(np.uint16), again[:used].view(np.uint16))
    if not used:
        return
    x = q[:used].astype(np.float64) * by_element(scale[:used], n, k)
    exact = weights.astype(np.float64) * by_element(scales, n, k)
    group = np.repeat(np.arange(len(sizes)), sizes)
    want = np.concatenate([x[group == e] @ exact[FIRST + e].T for e in range(len(sizes))])
    bound = np.concatenate([np.abs(x[group == e]) @ np.abs(exact[FIRST + e]).T for e in range(len(sizes))])
    slack = UNIT * np.abs(want) + TENSOR_CORE * bound
    error = np.abs(out[:used].astype(np.float64) - want)
    assert (error <= slack).all(), f"worst: {(error / slack).max()} of what is allowed"
    relative = np.linalg.norm(error) / np.linalg.norm(want)
    assert relative < 2 * UNIT, f"{relative}: more than rounding the result"
    other = np.abs(np.roll(out[:used].astype(np.float64), 1, axis=1) - want)
    assert (other > slack).mean() > 0.9, "other outputs are other"


@pytest.mark.parametrize(
    "sizes",
    [
        [300, 0, 1, 128, 700],
        [0, 0, 0, 0, 0],
        [0, 900, 0, 0, 0],
        [1, 1, 1, 1, 1],
        [64, 65, 127, 129, 255],
        [0, 0, 0, 0, 1],
    ],
)
def test_groups(sizes: list[int]) -> None:
    check(sizes, 512, 1024)


@pytest.mark.parametrize(("n", "k"), [(576, 7168), (200, 144), (8, 16), (1280, 10944), (128, 128), (136, 1408)])
def test_sizes_that_tiles_do_not_divide(n: int, k: int) -> None:
    check([5, 0, 170], n, k)


@pytest.mark.parametrize("rows", [1, 200, 4096])
def test_one_group(rows: int) -> None:
    check([rows], 1536, 1536)


def test_several_tiles_of_a_multiprocessor() -> None:
    """Its ring of stages goes on between tiles, of more stages than the ring has."""
    check([300, 5, 200], 8192, 2048)


def test_many_groups() -> None:
    sizes = np.bincount(np.random.default_rng(3).integers(0, 384, 3000), minlength=384).tolist()
    check(sizes, 256, 256)


def test_a_row_does_not_depend_on_the_others() -> None:
    rng = np.random.default_rng(4)
    x = jnp.asarray(rng.normal(size=(1000, 2048)), jnp.bfloat16)
    weights = random_e4m3(rng, (2, 512, 2048)).view(np.uint8)
    matrices = ScaledMatrices(jnp.asarray(weights), jnp.ones((2, 4, 16), jnp.float32), (128, 128), BF16)
    run = jax.jit(
        lambda x, sizes, first: grouped_matmul(quantize_rows(x), matrices, sizes, first, implementation="hopper")
    )
    whole = np.asarray(run(x, jnp.array([0, 1000], jnp.int32), 0)).view(np.uint16)
    part = np.asarray(run(x[333:340], jnp.array([7], jnp.int32), 1)).view(np.uint16)
    np.testing.assert_array_equal(whole[333:340], part)
    assert (whole[332:339] != part).any()


def numpy_rows(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """`quantize_rows` in NumPy: values of e4m3 in float32, and scales."""
    m, k = x.shape
    blocks = np.pad(x, ((0, 0), (0, -k % 128))).reshape(m, -1, 128)
    largest = np.maximum(np.abs(blocks).max(-1), np.float32(1e-30))
    q = (blocks * (np.float32(448) / largest)[..., None]).astype(E4M3).reshape(m, -1)[:, :k]
    return q.astype(np.float32), largest / np.float32(448)


def check_rows(rows: ScaledRows, want: np.ndarray, scale: np.ndarray) -> None:
    np.testing.assert_allclose(rows.scale, scale, rtol=1e-5)
    got = np.asarray(rows.q).view(E4M3).astype(np.float32)
    step = np.maximum(np.abs(want) / 8, 2.0**-9)
    assert (np.abs(got - want) <= step).all(), "by one step of e4m3 at most"
    assert (got != want).mean() < 2e-3, "where a last bit turns a tie"


@pytest.mark.parametrize("kernels", [True, False])
def test_quantization_is_that_of_numpy(kernels: bool) -> None:
    """Of tiny and of equal numbers, of zeros, of a rest of columns; by the kernel and by XLA."""
    rng = np.random.default_rng(5)
    x = (rng.normal(size=(301, 1000)) * 10.0 ** rng.integers(-12, 12, (301, 1))).astype(BF16)
    x[7], x[8, :500], x[9] = 0, 1e-20, 3.0
    rows = jax.jit(functools.partial(quantize, kernels=kernels))(jnp.asarray(x))
    want, scale = numpy_rows(x.astype(np.float32))
    check_rows(rows, want, scale)
    assert not np.asarray(rows.q)[7].any()
    x[3, 5] = np.nan
    rows = jax.jit(functools.partial(quantize, kernels=kernels))(jnp.asarray(x))
    assert np.isnan(np.asarray(dequantize_rows(rows))[3, 5]), "NaN stays"


@pytest.mark.parametrize("kernels", [True, False])
def test_gated_quantization(kernels: bool) -> None:
    rng = np.random.default_rng(6)
    gate_up = rng.normal(size=(77, 2 * 1408), scale=3).astype(BF16)
    weight = rng.uniform(0.01, 1, 77).astype(np.float32)
    run = jax.jit(functools.partial(quantize_gated, kernels=kernels))
    rows = run(jnp.asarray(gate_up), jnp.asarray(weight))
    gate, up = np.split(gate_up.astype(np.float64), 2, axis=1)
    exact = gate / (1 + np.exp(-gate)) * up * weight[:, None]
    check_rows(rows, *numpy_rows(exact.astype(np.float32)))


def test_refusals_name_the_argument() -> None:
    rows = ScaledRows(jnp.zeros((200, 256), jnp.uint8), jnp.ones((200, 2), jnp.float32))
    weights = ScaledMatrices(
        jnp.zeros((4, 256, 256), jnp.uint8), jnp.ones((4, 2, 2), jnp.float32), (128, 128), np.dtype(BF16)
    )
    sizes = jnp.array([200], jnp.int32)
    with pytest.raises(jax.errors.JaxRuntimeError, match=r"w8a8: weight_scales: expected float32\[4, 2, 2\]"):
        multiply(rows, dataclasses.replace(weights, scale=weights.scale[:, :1]), sizes, 0).block_until_ready()
    with pytest.raises(jax.errors.JaxRuntimeError, match=r"w8a8: row_scales: expected float32\[2, 200\]"):
        multiply(ScaledRows(rows.q, rows.scale[:, :1]), weights, sizes, 0).block_until_ready()
