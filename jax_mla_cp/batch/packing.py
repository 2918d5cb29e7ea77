"""A step's arrays in transit: two arrays of words, one for each way in which the mesh divides them.

A step has some 25 small arrays, and placing an array on every device costs the host more than what is in it. So each device's
parts of all arrays that are divided alike follow each other as 32-bit words, floats by their bits. Inside the jitted step,
`DeviceBatch.unpack` slices them apart again: the model sees a `Batch` alone.
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
from jaxtyping import Float, Int32

from jax_mla_cp.batch.arrays import Array, Batch
from jax_mla_cp.mesh import DP, TOKENS, MeshShape, declared_specs

_RANK_SPEC, _GROUP_SPEC = PartitionSpec(TOKENS), PartitionSpec(DP)
_ALIGNMENT = 32
"""Words after which an array may begin, 128 bytes: XLA hands a slice to a kernel where it lies, and those of FlashAttention-3
refuse an address that is not a multiple of 16 bytes (ffi/arguments.h)."""


@dataclasses.dataclass(frozen=True)
class _Field:
    """Place of one of the batch's arrays in a device's words."""

    name: str
    spec: PartitionSpec
    start: int
    shape: tuple[int, ...]
    """On one device."""
    dtype: str

    @property
    def end(self) -> int:
        return self.start + math.prod(self.shape)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DeviceBatch:
    """A step's batch as the compiled step takes it. Its repr lists the arrays that `unpack` makes."""

    rank_words: Int32[Array, " dp*cp*words"] = dataclasses.field(metadata={"spec": _RANK_SPEC})
    group_words: Int32[Array, " dp*words"] = dataclasses.field(metadata={"spec": _GROUP_SPEC})
    embeds: Float[Array, "T D"] | None = dataclasses.field(metadata={"spec": _RANK_SPEC})
    """As in `Batch`: wide, and not of 32 bits."""
    fields: tuple[_Field, ...] = dataclasses.field(metadata={"static": True})
    tree: Any = dataclasses.field(metadata={"static": True})
    """PyTreeDef of the batch without embeds."""

    def unpack(self) -> Batch:
        """The batch, on each device from its own words."""

        def array(field: _Field) -> Any:
            words = self.rank_words if field.spec == _RANK_SPEC else self.group_words
            cut = words[field.start : field.end].reshape(field.shape)
            return cut if field.dtype == "int32" else lax.bitcast_convert_type(cut, jnp.dtype(field.dtype))

        batch: Batch = jax.tree.unflatten(self.tree, [array(field) for field in self.fields])
        return dataclasses.replace(batch, embeds=self.embeds)

    def __repr__(self) -> str:
        lines = [(f.name, f"{f.dtype}{list(f.shape)}", str(f.spec)) for f in self.fields]
        if self.embeds is not None:
            lines.append(("embeds", f"{self.embeds.dtype}{list(self.embeds.shape)} in all", str(_RANK_SPEC)))
        widths = [max(len(line[i]) for line in lines) for i in (0, 1)]
        rows = [f"  {name:{widths[0]}}  {shape:{widths[1]}}  {spec}" for name, shape, spec in lines]
        return "\n".join(["DeviceBatch, per device:", *rows])


def pack(batch: Batch, mesh: MeshShape) -> DeviceBatch:
    """Packs a host batch, NumPy arrays of int32, uint32 and float32; the result is NumPy too.

    Raises:
      TypeError: an array of another dtype.
    """
    leaves, tree = jax.tree.flatten(dataclasses.replace(batch, embeds=None))
    counts = mesh.dp * mesh.cp, mesh.dp
    fields = _fields(tree, tuple((leaf.shape, leaf.dtype.name) for leaf in leaves), counts)

    def words(spec: PartitionSpec, count: int) -> np.ndarray:
        alike = [(field, leaf) for field, leaf in zip(fields, leaves, strict=True) if field.spec == spec]
        packed = np.zeros((count, _aligned(max((field.end for field, _ in alike), default=0))), np.int32)
        for field, leaf in alike:
            packed[:, field.start : field.end] = leaf.reshape(count, -1).view(np.int32)
        return packed.reshape(-1)

    return DeviceBatch(words(_RANK_SPEC, counts[0]), words(_GROUP_SPEC, counts[1]), batch.embeds, fields, tree)


def _aligned(words: int) -> int:
    return -(-words // _ALIGNMENT) * _ALIGNMENT


@functools.lru_cache
def _fields(tree: Any, arrays: tuple[tuple[tuple[int, ...], str], ...], counts: tuple[int, int]) -> tuple[_Field, ...]:
    """The same object for the same arrays: JAX compares it in every call of a program."""
    fields: list[_Field] = []
    devices = {_RANK_SPEC: counts[0], _GROUP_SPEC: counts[1]}
    ends = dict.fromkeys(devices, 0)
    batch: Batch = jax.tree.unflatten(tree, range(len(arrays)))
    for (path, spec), (shape, dtype) in zip(jax.tree.leaves_with_path(declared_specs(batch)), arrays, strict=True):
        if dtype not in ("int32", "uint32", "float32"):
            raise TypeError(f"a step's arrays must be int32, uint32 or float32, got {dtype}.")
        local = (shape[0] // devices[spec], *shape[1:])
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        fields.append(_Field(name, spec, ends[spec], local, dtype))
        ends[spec] = _aligned(fields[-1].end)
    return tuple(fields)
