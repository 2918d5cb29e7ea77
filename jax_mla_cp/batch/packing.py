"""A step's arrays in two: what reaches the devices in one transfer for each way of dividing it, and is cut up there.

A step has some 25 small arrays, and to place one on every device costs the host more than what is in it. Packed, each
device's parts of the arrays that are divided alike follow each other as 32-bit words, floats by their bits; inside of the
jitted step, static slices make the `Batch` of them again, which is all that the model sees.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import PartitionSpec

from jax_mla_cp.batch.arrays import Batch, batch_specs
from jax_mla_cp.mesh import DP, TOKENS, MeshShape

_WORDS = PartitionSpec(TOKENS), PartitionSpec(DP)
"""How the two arrays of words are divided."""
_ALIGNMENT = 32
"""Words after which an array may begin, 128 bytes: XLA hands a slice to a kernel where it lies, and those of FlashAttention-3
refuse an address that is no multiple of 16 bytes (ffi/arguments.h)."""


@dataclasses.dataclass(frozen=True)
class _Part:
    """One of the batch's arrays, as a device has it."""

    array: int
    """0: among the ranks' words, 1: among the groups'."""
    start: int
    shape: tuple[int, ...]
    dtype: str

    @property
    def end(self) -> int:
        return self.start + math.prod(self.shape)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Packed:
    """A `Batch` on its way to the devices, or there. `unpack` gives it back."""

    ranks: Any  # int32 [dp cp * words]  P(("dp", "cp"))
    groups: Any  # int32 [dp * words]    P("dp")
    embeds: Any  # as in Batch: wide, and not of 32 bits
    parts: tuple[_Part, ...] = dataclasses.field(metadata={"static": True})
    tree: Any = dataclasses.field(metadata={"static": True})
    """The batch's tree without embeds."""


def pack(batch: Batch, mesh: MeshShape) -> Packed:
    """Packs a host batch (NumPy arrays of int32, uint32 and float32).

    Raises:
      TypeError: an array of another dtype.
    """
    leaves, tree = jax.tree.flatten(dataclasses.replace(batch, embeds=None))
    counts = mesh.dp * mesh.cp, mesh.dp
    parts = _parts(tree, tuple((leaf.shape, leaf.dtype.name) for leaf in leaves), counts)
    ends = [max((part.end for part in parts if part.array == array), default=0) for array in (0, 1)]
    words = [np.zeros((count, _aligned(end)), np.int32) for count, end in zip(counts, ends, strict=True)]
    for leaf, part in zip(leaves, parts, strict=True):
        words[part.array][:, part.start : part.end] = leaf.reshape(counts[part.array], -1).view(np.int32)
    ranks, groups = (array.reshape(-1) for array in words)
    return Packed(ranks, groups, batch.embeds, parts, tree)


def _aligned(words: int) -> int:
    return -(-words // _ALIGNMENT) * _ALIGNMENT


@functools.lru_cache
def _parts(tree: Any, arrays: tuple[tuple[tuple[int, ...], str], ...], counts: tuple[int, int]) -> tuple[_Part, ...]:
    """The same object for the same arrays: JAX compares it in every call of a program."""
    parts, ends = [], [0, 0]
    specs = jax.tree.leaves(batch_specs(jax.tree.unflatten(tree, range(len(arrays)))))
    for (shape, dtype), spec in zip(arrays, specs, strict=True):
        if dtype not in ("int32", "uint32", "float32"):
            raise TypeError(f"a step's arrays must be int32, uint32 or float32, got {dtype}.")
        which = _WORDS.index(spec)
        local = (shape[0] // counts[which], *shape[1:])
        parts.append(_Part(which, ends[which], local, dtype))
        ends[which] = _aligned(parts[-1].end)
    return tuple(parts)


def unpack(packed: Packed | Batch) -> Batch:
    """The batch, on each device from its words. (A batch that was never packed is one already.)"""
    if isinstance(packed, Batch):
        return packed
    arrays = packed.ranks, packed.groups

    def cut(part: _Part) -> jax.Array:
        words = arrays[part.array][part.start : part.end].reshape(part.shape)
        return words if part.dtype == "int32" else lax.bitcast_convert_type(words, jnp.dtype(part.dtype))

    batch: Batch = jax.tree.unflatten(packed.tree, [cut(part) for part in packed.parts])
    return dataclasses.replace(batch, embeds=packed.embeds)


def packed_specs(batch: Packed | Batch) -> Any:
    """A tree of PartitionSpecs, for what `unpack` takes."""
    if isinstance(batch, Batch):
        return batch_specs(batch)
    ranks, groups = _WORDS
    return dataclasses.replace(batch, ranks=ranks, groups=groups, embeds=None if batch.embeds is None else ranks)
