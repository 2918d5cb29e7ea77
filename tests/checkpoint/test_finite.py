"""Every bit pattern of the dtypes that checkpoints have."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest

from jax_mla_cp.checkpoint.finite import all_finite, count_not_finite

BITS = {8: np.arange(1 << 8, dtype=np.uint8), 16: np.arange(1 << 16, dtype=np.uint16)}


@pytest.mark.parametrize("dtype", [ml_dtypes.float8_e4m3fn, ml_dtypes.bfloat16, np.float16])
def test_each_bit_pattern(dtype: Any) -> None:
    values = BITS[8 * np.dtype(dtype).itemsize].view(dtype)
    number = np.isfinite(values.astype(np.float64))
    assert 0 < (~number).sum() == count_not_finite(values)
    assert all_finite(values[number]) and count_not_finite(values[number]) == 0
    assert not any(all_finite(np.append(values[:1], bad)) for bad in values[~number])


def test_layouts_and_integers() -> None:
    wide = np.zeros((4, 6), ml_dtypes.bfloat16)
    wide[2, 4] = np.nan
    assert [count_not_finite(part) for part in (wide.T, wide[:, ::2], wide[:, 1::2], wide[:0])] == [1, 1, 0, 0]
    assert count_not_finite(np.array([1, np.nan, np.inf], np.float32)) == 2
    assert all_finite(np.array([0x7F, 0xFF], np.uint8)), "plain bytes"
    assert all_finite(np.zeros((0, 3), ml_dtypes.float8_e4m3fn))
