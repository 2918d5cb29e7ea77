"""A parameter that is being loaded, and the places in it that checkpoint tensors go to."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from numpy.typing import NDArray

from jax_mla_cp.checkpoint.huggingface import Piece, layers_of, pieces
from jax_mla_cp.checkpoint.source import TensorSource
from jax_mla_cp.config import ModelConfig


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a piece goes, and with a routed piece, where the same expert slot of every rank goes."""

    piece: Piece
    layer: int | None
    slot: int
    """Which of a rank's own experts; 0 for what is no expert."""
    shape: tuple[int, ...]
    """Of the array that goes there: [1 if stacked, ranks if routed, *inner]."""
    start: tuple[int, ...]
    """Its offset within each rank's part of the parameter."""


@dataclasses.dataclass(frozen=True)
class Target:
    """A parameter: [layers if stacked, experts if routed, *inner]."""

    path: str
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    sharding: NamedSharding | None
    pieces: tuple[Piece, ...]
    layers: range | None
    """The model's layers that it stacks."""
    experts: int
    """How many there really are; those after them only pad the parameter, with zeros."""
    ranks: int
    """Devices that the experts are divided over; 1 if it has none."""

    @classmethod
    def of(cls, path: tuple[Any, ...], param: nnx.Variable[Any], config: ModelConfig, mesh: Mesh | None) -> Target:
        """From a declared parameter: a ShapeDtypeStruct with metadata `spec`."""
        value: jax.ShapeDtypeStruct = param.get_value()
        name = ".".join(map(str, path))
        made_of = pieces(config)[name]
        sharding = None if mesh is None else NamedSharding(mesh, param.get_metadata("spec"))
        divided = sharding.shard_shape(value.shape) if sharding else value.shape
        ranks = value.shape[1] // divided[1] if made_of[0].routed else 1
        layers = layers_of(name, config)
        return cls(name, value.shape, value.dtype, sharding, made_of, layers, config.n_routed_experts, ranks)

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def routed(self) -> bool:
        return self.pieces[0].routed

    @property
    def leading(self) -> int:
        """Stacked dimensions: layers, experts."""
        return (self.layers is not None) + self.routed

    @property
    def whole(self) -> bool:
        """One place fills it, so that it need not be allocated first."""
        return self._shape(self.pieces[0]) == self.shape

    def places(self, layer: int | None) -> Iterator[Place]:
        """The places of a model's layer, or of what belongs to no layer (None)."""
        if layer not in (self.layers or (None,)):
            return
        stacked = () if self.layers is None or layer is None else (layer - self.layers.start,)
        for slot in range(self.shape[1] // self.ranks if self.routed else 1):
            for piece in self.pieces:
                start = (*stacked, *((slot,) if self.routed else ()), *(first for first, _ in self._bounds(piece)))
                yield Place(piece, layer, slot, self._shape(piece), start)

    def part(self, source: TensorSource, place: Place, bounds: tuple[tuple[int, int], ...]) -> NDArray[Any]:
        """The part of what goes to `place` that one device keeps; zeros where the parameter is padded."""
        inner = bounds[self.leading :]
        shape = tuple(end - begin for begin, end in bounds)
        expert = 0
        if self.routed:
            expert = bounds[self.leading - 1][0] * (self.shape[1] // self.ranks) + place.slot
            if expert >= self.experts:
                return np.zeros(shape, self.dtype)
        tensor = source.read(place.piece.name.format(layer=place.layer, expert=expert))
        got = place.piece.view(tensor)[tuple(slice(*b) for b in inner)]
        if got.shape != shape[self.leading :]:  # the vocabulary, padded
            got = np.pad(got, [(0, end - begin - n) for (begin, end), n in zip(inner, got.shape, strict=True)])
        got = got.astype(self.dtype, copy=False).reshape(shape)
        # JAX may alias a contiguous array; the file must not stay mapped, and able to change, under a parameter. A
        # transposed one it copies anyway, and faster than NumPy.
        return got.copy() if got.flags.c_contiguous and np.may_share_memory(got, tensor) else got

    def _bounds(self, piece: Piece) -> list[tuple[int, int]]:
        """The part of one layer (and expert) that a piece fills, per dimension."""
        inner = self.shape[self.leading :]
        return [at.indices(size)[:2] for at, size in zip(piece.at or (slice(None),) * len(inner), inner, strict=True)]

    def _shape(self, piece: Piece) -> tuple[int, ...]:
        stacked = () if self.layers is None else (1,)
        return (*stacked, *((self.ranks,) if self.routed else ()), *(end - begin for begin, end in self._bounds(piece)))
