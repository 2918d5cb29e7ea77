"""A checkpoint in memory."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray


class ArraySource:
    """A `TensorSource` of arrays in memory."""

    def __init__(self, arrays: Mapping[str, NDArray[Any]]):
        self._arrays = arrays

    def names(self) -> Iterable[str]:
        return self._arrays.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        return self._arrays[name].shape

    def dtype(self, name: str) -> np.dtype[Any]:
        return self._arrays[name].dtype

    def read(self, name: str) -> NDArray[Any]:
        return self._arrays[name]
