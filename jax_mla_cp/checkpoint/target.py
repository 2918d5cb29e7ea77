"""A parameter that is being loaded, and the places in it that checkpoint tensors go to."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Set
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from numpy.typing import NDArray

from jax_mla_cp.checkpoint.huggingface import Piece, layers_of, pieces
from jax_mla_cp.checkpoint.source import CheckpointError, TensorSource
from jax_mla_cp.config.model import ModelConfig
from jax_mla_cp.config.quantization import FP8, Quantization
from jax_mla_cp.model.fp8 import dequantize, fp8_bytes, unpack_int4


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

    def tensor(self, expert: int) -> str:
        """The matrix's name in the checkpoint. Its tensors are this and a suffix, if it is quantized."""
        return self.piece.name.format(layer=self.layer, expert=expert)


@dataclasses.dataclass(frozen=True)
class Operand:
    """A tensor of which a place is made, in the parameter's layout."""

    suffix: str
    dtype: np.dtype[Any]
    """In which the device gets it."""
    per: tuple[int, ...]
    """Elements of the place for each of its own, along each dimension."""

    def shape(self, place: Place) -> tuple[int, ...]:
        return tuple(-(-size // per) for size, per in zip(place.shape, self.per, strict=True))


@dataclasses.dataclass(frozen=True)
class Decode:
    """From a place's operands to what is written there; runs on the device."""

    dtype: np.dtype[Any]
    packed_dim: int | None = None
    """Along which the first operand is packed."""
    blocks: tuple[int, ...] = ()
    """The second operand are scales of such blocks."""

    def __call__(self, stored: jax.Array, scale: jax.Array | None = None) -> jax.Array:
        if self.packed_dim is not None:
            stored = fp8_bytes(unpack_int4(stored, self.packed_dim))
        if scale is None:
            return stored.astype(self.dtype)
        return dequantize(stored, scale, self.blocks, self.dtype)


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
    quantization: Quantization | None
    """How the checkpoint may have quantized it; None: it never is."""
    blocks: tuple[int, ...]
    """Elements of the matrix that share a scale, along each dimension; () if it is never quantized."""
    holds: str
    """Of a matrix that stays quantized "q" or its "scale"; "" for all others."""

    @classmethod
    def of(cls, path: tuple[Any, ...], param: nnx.Variable[Any], config: ModelConfig, mesh: Mesh | None) -> Target:
        """From a declared parameter: a ShapeDtypeStruct with metadata `spec` and `blocks`."""
        value: jax.ShapeDtypeStruct = param.get_value()
        name, holds, table = ".".join(map(str, path)), "", pieces(config)
        made_of = table.get(name)
        if made_of is None:
            parent, _, holds = name.rpartition(".")
            made_of = table[parent]
        sharding = None if mesh is None else NamedSharding(mesh, param.get_metadata("spec"))
        divided = sharding.shard_shape(value.shape) if sharding else value.shape
        ranks = value.shape[1] // divided[1] if made_of[0].routed else 1
        layers, blocks = layers_of(name, config), param.get_metadata("blocks")
        quantization = config.quantization if blocks else None
        return cls(
            name,
            value.shape,
            value.dtype,
            sharding,
            made_of,
            layers,
            config.n_routed_experts,
            ranks,
            quantization,
            blocks,
            holds,
        )

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
        """One place fills it, with nothing to decode, so that it need not be allocated first."""
        return self.quantization is None and self._shape(self.pieces[0]) == self.shape

    def places(self, layer: int | None) -> Iterator[Place]:
        """The places of a model's layer, or of what belongs to no layer (None)."""
        if layer not in (self.layers or (None,)):
            return
        stacked = () if self.layers is None or layer is None else (layer - self.layers.start,)
        for slot in range(self.shape[1] // self.ranks if self.routed else 1):
            for piece in self.pieces:
                start = (*stacked, *((slot,) if self.routed else ()), *(first for first, _ in self._bounds(piece)))
                yield Place(piece, layer, slot, self._shape(piece), start)

    def operands(self, place: Place, names: Set[str]) -> tuple[Operand, ...]:
        """What is read for a place, of a checkpoint with the tensors `names`."""
        ones, q = (1,) * len(self.shape), self.quantization
        # Of a layer's experts all are quantized or none is, which `check_tensors` sees to: rank 0's tells it for all ranks'.
        if q is None or not q.quantizes(place.tensor(place.slot), names):
            return (Operand("", self.dtype, ones),)
        packed = tuple(q.packed if dim == self.leading else 1 for dim in range(len(self.shape)))
        stored = Operand(q.stored_suffix, np.dtype(np.int32 if q.packed > 1 else np.uint8), packed)
        # The shape of a parameter that holds scales counts them itself.
        scale = Operand(q.scale_suffix, q.scale_dtype, ones if self.holds == "scale" else self.blocks)
        return {"q": (stored,), "scale": (scale,), "": (stored, scale)}[self.holds]

    def decode(self, operands: tuple[Operand, ...]) -> Decode:
        """What makes of a place's operands the array that goes there."""
        packed_dim = self.leading if operands[0].per[self.leading] > 1 else None
        return Decode(self.dtype, packed_dim, self.blocks if len(operands) > 1 else ())

    def part(
        self, source: TensorSource, place: Place, operand: Operand, bounds: tuple[tuple[int, int], ...]
    ) -> NDArray[Any]:
        """The part of an operand of `place` that one device needs; zeros where the parameter is padded.

        Raises:
          CheckpointError: a scale that is not a number, or another size in a packed matrix's own words.
        """
        inner = bounds[self.leading :]
        shape = tuple(end - begin for begin, end in bounds)
        expert = 0
        if self.routed:
            expert = bounds[self.leading - 1][0] * (self.shape[1] // self.ranks) + place.slot
            if expert >= self.experts:
                return np.zeros(shape, operand.dtype)
        tensor = self._read(source, place.tensor(expert), place.piece, operand)
        got = place.piece.view(tensor)[tuple(slice(*b) for b in inner)]
        if got.shape != shape[self.leading :]:  # the vocabulary, padded
            got = np.pad(got, [(0, end - begin - n) for (begin, end), n in zip(inner, got.shape, strict=True)])
        got = got.astype(operand.dtype, copy=False).reshape(shape)
        # JAX may alias a contiguous array; the file must not stay mapped, and able to change, under a parameter. A
        # transposed one it copies anyway, and faster than NumPy.
        return got.copy() if got.flags.c_contiguous and np.may_share_memory(got, tensor) else got

    def _read(self, source: TensorSource, name: str, piece: Piece, operand: Operand) -> NDArray[Any]:
        """The operand as it is stored, [outputs, inputs]; scales with fewer of each where blocks stay whole."""
        tensor, q = source.read(name + operand.suffix), self.quantization
        if q is not None and operand.suffix == q.scale_suffix:
            if not np.isfinite(tensor).all():
                raise CheckpointError(
                    name + operand.suffix, "a scale is NaN or infinite. Download the checkpoint again."
                )
            # `blocks` begins with the inputs and ends with the outputs. Where it has 1, every element gets its block's scale.
            kept = self.blocks[-1], self.blocks[self.leading]
            for dim in (0, 1):
                tensor = np.repeat(tensor, q.block[dim] // kept[dim], axis=dim)
            outputs, inputs = (-(-size // block) for size, block in zip(piece.stored, kept, strict=True))
            return tensor[:outputs, :inputs]
        if q is not None and q.shape_suffix and operand.suffix == q.stored_suffix:
            told = source.read(name + q.shape_suffix).tolist()
            if tuple(told) != piece.stored:
                raise CheckpointError(name + q.shape_suffix, f"expected {list(piece.stored)}, got {told}.")
        return tensor.view(np.uint8) if tensor.dtype == FP8 else tensor

    def _bounds(self, piece: Piece) -> list[tuple[int, int]]:
        """The part of one layer (and expert) that a piece fills, per dimension."""
        inner = self.shape[self.leading :]
        per = self.blocks[self.leading :] if self.holds == "scale" else (1,) * len(inner)
        at = piece.at or (slice(None),) * len(inner)
        return [_in_blocks(part, block).indices(size)[:2] for part, block, size in zip(at, per, inner, strict=True)]

    def _shape(self, piece: Piece) -> tuple[int, ...]:
        stacked = () if self.layers is None else (1,)
        return (*stacked, *((self.ranks,) if self.routed else ()), *(end - begin for begin, end in self._bounds(piece)))


def _in_blocks(part: slice, block: int) -> slice:
    """A slice of elements as one of blocks."""
    return slice(*(None if end is None else -(-end // block) for end in (part.start, part.stop)))
