"""The few-row kernel's Python side, which needs no GPU: which operands fit, and the order of the columns."""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_mla_cp.model.few_rows import fits, interleave, is_fastest
from jax_mla_cp.model.fp8 import Matrices, ScaledMatrices
from jax_mla_cp.model.grouped_matmul import group_alignment, grouped_matmul, multiplies_fp8

BF16 = np.dtype(jnp.bfloat16)


def fragment_inputs(c: int) -> list[int]:
    """The inputs of 16 that a thread's operand has: PTX ISA, "register fragments for wgmma.mma_async.m64nNk16"."""
    return [2 * c, 2 * c + 1, 2 * c + 8, 2 * c + 9]


def widened_bytes(c: int) -> list[int]:
    """The bytes of a row's 16 that the kernel's `Widen` puts into the same four places: of the word 4c .. 4c + 3."""
    return [4 * c, 4 * c + 2, 4 * c + 1, 4 * c + 3]


def test_columns_meet_the_bytes_that_they_are_multiplied_with() -> None:
    rows = jnp.arange(3 * 64).reshape(3, 64)
    placed = np.asarray(interleave(rows))
    for row in range(3):
        for step in range(4):
            for c in range(4):
                operand = placed[row, 16 * step + np.array(fragment_inputs(c))]
                np.testing.assert_array_equal(operand, row * 64 + 16 * step + np.array(widened_bytes(c)))
    assert (placed != np.asarray(rows)).any()


def weights(
    n: int, k: int, block: tuple[int, int] | None = None, scale: jax.typing.DTypeLike = jnp.float32
) -> Matrices:
    if block is None:
        return jnp.zeros((2, n, k), jnp.bfloat16)
    scales = jnp.ones((2, -(-n // block[0]), -(-k // block[1])), scale)
    return ScaledMatrices(jnp.zeros((2, n, k), jnp.uint8), scales, block, BF16)


@pytest.mark.parametrize(
    ("matrices", "groups", "fit"),
    [
        (weights(64, 64), 2, True),
        (weights(64, 96), 2, False),
        (weights(60, 64), 2, False),
        (weights(64, 64), 513, False),
        (weights(576, 7168, (128, 128)), 1, True),
        (weights(576, 7168, (128, 64)), 1, False),
        (weights(576, 7168, (32, 128)), 1, False),
        (weights(576, 7168, (128, 128), jnp.bfloat16), 1, False),
        (weights(576, 7168, (1, 32), jnp.bfloat16), 1, True),
        (weights(576, 7168, (1, 32), jnp.float32), 1, False),
        (weights(576, 7168 + 64, (1, 32), jnp.bfloat16), 1, False),
    ],
)
def test_fits(matrices: Matrices, groups: int, fit: bool) -> None:
    assert fits(matrices, groups) == fit
    assert not fits(jnp.zeros(matrices.shape, jnp.float32), groups)


@pytest.mark.parametrize(
    ("block", "groups", "most"), [(None, 1, 64), (None, 2, 64), ((128, 128), 1, 256), ((128, 128), 2, 1024)]
)
def test_up_to_how_many_rows(block: tuple[int, int] | None, groups: int, most: int) -> None:
    """In all groups, for one and for several: 32 a group in bfloat16, 512 in FP8."""
    matrices = weights(256, 256, block)
    assert is_fastest(matrices, most, groups) and not is_fastest(matrices, most + 1, groups)


@pytest.mark.parametrize(
    ("block", "rows", "expected", "target"),
    [
        ((128, 128), 32, None, "few_rows_scaled"),
        ((1, 32), 32, None, "few_rows_scaled"),
        (None, 32, None, "few_rows"),
        ((128, 128), 8192, None, None),
        (None, 8192, None, None),
        ((128, 128), 8192, 32, "few_rows_scaled"),  # a buffer for the worst routing
        ((8, 8), 32, None, None),
    ],
)
def test_which_kernel_multiplies(
    block: tuple[int, int] | None, rows: int, expected: int | None, target: str | None
) -> None:
    pytest.importorskip("jax_mla_cp._ffi", reason="the extension is not built")
    matrices = weights(256, 256, block, jnp.bfloat16 if block == (1, 32) else jnp.float32)

    def multiply(x: jax.Array, sizes: jax.Array) -> jax.Array:
        return grouped_matmul(x, matrices, sizes, implementation="hopper", expected_rows=expected)

    jaxpr = str(jax.make_jaxpr(multiply)(jnp.zeros((rows, 256), jnp.bfloat16), jnp.array([8, 8], jnp.int32)))
    found = {name for name in ("few_rows_scaled", "few_rows") if re.search(rf"\b{name}\b", jaxpr)}
    assert found == ({target} if target else set()), "None: the Pallas kernel"
    if isinstance(matrices, ScaledMatrices):
        assert multiplies_fp8(matrices, expected or rows, 2, "hopper") == (target is not None)
        assert multiplies_fp8(matrices, 1, 2, "blocks") and not multiplies_fp8(matrices, 1, 2, "pallas")


def test_one_group_of_many_rows_is_dequantized() -> None:
    """Beyond what the kernel is fastest for, a dense matrix is one product of XLA's."""
    pytest.importorskip("jax_mla_cp._ffi", reason="the extension is not built")
    matrices = weights(256, 256, (128, 128))
    for rows, few in ((256, True), (257, False)):
        x = jnp.zeros((rows, 256), jnp.bfloat16)
        jaxpr = jax.make_jaxpr(lambda x: grouped_matmul(x, matrices, None, 1, implementation="hopper"))(x)
        assert ("few_rows_scaled" in str(jaxpr)) == few and ("dot_general" in str(jaxpr)) != few


def test_groups_are_aligned_for_the_pallas_kernel_alone() -> None:
    fp8, plain = weights(256, 256, (128, 128)), weights(256, 256)
    assert [group_alignment(fp8, rows, 4, "hopper") for rows in (4 * 128, 4 * 512, 4 * 513)] == [1, 1, 128]
    assert [group_alignment(plain, rows, 4, "hopper") for rows in (4 * 32, 4 * 127, 4 * 128)] == [1, 1, 128]
    assert group_alignment(fp8, 4 * 128, 4, "pallas") == 128
