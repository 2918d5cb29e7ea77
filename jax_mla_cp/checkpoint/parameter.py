"""A parameter that is being loaded, and the regions of it that the checkpoint's tensors fill."""

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

from jax_mla_cp.checkpoint.errors import CheckpointError
from jax_mla_cp.checkpoint.finite import all_finite
from jax_mla_cp.checkpoint.huggingface import TensorMapping, stacked_layers, tensor_mappings
from jax_mla_cp.checkpoint.tensor_source import TensorSource
from jax_mla_cp.config.model import ModelConfig
from jax_mla_cp.config.quantization import FP8, Quantization
from jax_mla_cp.model.fp8 import dequantize, fp8_bytes, unpack_int4

Bounds = tuple[tuple[int, int], ...]
"""(begin, end) along each dimension."""


@dataclasses.dataclass(frozen=True)
class Region:
    """The part of a parameter that one checkpoint tensor fills; for experts, one tensor for each expert-parallel rank."""

    mapping: TensorMapping
    layer: int | None
    local_expert: int
    """Index of the expert among those of its rank; 0 for a parameter without experts."""
    shape: tuple[int, ...]
    """[1 if stacked, ep_size if routed, *inner]."""
    start: tuple[int, ...]
    """Offset within each rank's shard of the parameter."""

    def tensor_name(self, expert: int) -> str:
        """The matrix's name in the checkpoint. A quantized matrix is stored as several tensors: this name and a suffix."""
        return self.mapping.name.format(layer=self.layer, expert=expert)


@dataclasses.dataclass(frozen=True)
class Operand:
    """A stored tensor that a region is computed from, in the parameter's layout: the values, or their scales."""

    suffix: str
    dtype: np.dtype[Any]
    """On the device."""
    ratio: tuple[int, ...]
    """Elements of the region for each element of the operand, along each dimension."""
    scales: bool = False

    @property
    def packed(self) -> bool:
        return not self.scales and self.ratio[-1] > 1

    def shape(self, region: Region) -> tuple[int, ...]:
        return tuple(-(-size // ratio) for size, ratio in zip(region.shape, self.ratio, strict=True))


@dataclasses.dataclass(frozen=True)
class Dequantizer:
    """Computes a region from its operands, on the device: unpacks, scales and casts, as far as each is needed."""

    dtype: np.dtype[Any]
    packed: bool = False
    """Values are packed along the last dimension."""
    block: tuple[int, int] = (1, 1)
    """Outputs and inputs that share a scale."""

    def __call__(self, stored: jax.Array, scale: jax.Array | None = None) -> jax.Array:
        if self.packed:
            stored = fp8_bytes(unpack_int4(stored))
        if scale is None:
            return stored.astype(self.dtype)
        return dequantize(stored, scale, self.block, self.dtype)


@dataclasses.dataclass(frozen=True)
class Parameter:
    """A parameter [layers if stacked, experts if routed, *inner], its sharding, and the tensors that fill it."""

    path: str
    """`Decoder`'s attributes, joined with dots."""
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    sharding: NamedSharding | None
    mappings: tuple[TensorMapping, ...]
    layers: range | None
    """The model's layers that it stacks."""
    num_experts: int
    """The model's routed experts. The parameter may be padded to more, with zeros."""
    ep_size: int
    """Number of shards of its expert dimension; 1 without one."""
    quantization: Quantization | None
    """The checkpoint's format, if it may store this parameter quantized."""
    block: tuple[int, int]
    """Outputs and inputs that share a scale, as it is given to the devices: the checkpoint's, or a part of it if the parameter is
    dequantized, and the mesh or the loader's order of rows would cut blocks."""
    component: str
    """"q" or "scale" of a matrix that stays quantized; "" for every other parameter."""

    @classmethod
    def from_variable(
        cls, path: tuple[Any, ...], variable: nnx.Variable[Any], config: ModelConfig, mesh: Mesh | None
    ) -> Parameter:
        """Describes a declared parameter: a `jax.ShapeDtypeStruct` with `ParamFactory`'s metadata."""
        value: jax.ShapeDtypeStruct = variable.get_value()
        name, component, table = ".".join(map(str, path)), "", tensor_mappings(config)
        mappings = table.get(name)
        if mappings is None:
            parent, _, component = name.rpartition(".")
            mappings = table[parent]
        sharding = None if mesh is None else NamedSharding(mesh, variable.get_metadata("spec"))
        shard_shape = sharding.shard_shape(value.shape) if sharding else value.shape
        quantization = config.quantization if variable.get_metadata("quantized") else None
        block = (1, 1) if quantization is None else quantization.block
        if quantization and not component:
            block = _uncut(block, value.shape, shard_shape, mappings[0])
        return cls(
            path=name,
            shape=value.shape,
            dtype=value.dtype,
            sharding=sharding,
            mappings=mappings,
            layers=stacked_layers(name, config),
            num_experts=config.n_routed_experts,
            ep_size=value.shape[1] // shard_shape[1] if mappings[0].routed else 1,
            quantization=quantization,
            block=block,
            component=component,
        )

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def shard_shape(self) -> tuple[int, ...]:
        return self.sharding.shard_shape(self.shape) if self.sharding else self.shape

    @property
    def routed(self) -> bool:
        return self.mappings[0].routed

    @property
    def local_experts(self) -> int:
        """Experts on each rank, padding included; 1 for a parameter without experts."""
        return self.shape[1] // self.ep_size if self.routed else 1

    @property
    def stacked_dims(self) -> int:
        """Number of leading dimensions: layers, experts."""
        return (self.layers is not None) + self.routed

    @property
    def is_one_tensor(self) -> bool:
        """True if one plain tensor fills it, so that it need not be allocated first."""
        return self.quantization is None and self._region_shape(self.mappings[0]) == self.shape

    def regions(self, layer: int | None) -> Iterator[Region]:
        """Yields the regions of one of the model's layers; with None, those of a parameter that belongs to no layer."""
        if layer not in (self.layers or (None,)):
            return
        stacked = () if self.layers is None or layer is None else (layer - self.layers.start,)
        for local_expert in range(self.local_experts):
            for mapping in self.mappings:
                inner = (begin for begin, _ in self._inner_bounds(mapping))
                start = (*stacked, *((local_expert,) if self.routed else ()), *inner)
                yield Region(mapping, layer, local_expert, self._region_shape(mapping), start)

    def operands(self, region: Region, names: Set[str]) -> tuple[Operand, ...]:
        """The operands of a region, in a checkpoint with the tensors `names`."""
        ones, q = (1,) * len(self.shape), self.quantization
        # `check_tensors` has seen to it that either all of a layer's experts are quantized or none: rank 0's stands for all.
        if q is None or not q.quantizes(region.tensor_name(region.local_expert), names):
            return (Operand("", self.dtype, ones),)
        stored = Operand(q.stored_suffix, np.dtype(np.int32 if q.packed > 1 else np.uint8), (*ones[1:], q.packed))
        # The shape of a parameter that holds scales counts the scales themselves.
        ratio = ones if self.component == "scale" else (*ones[2:], *self.block)
        scale = Operand(q.scale_suffix, q.scale_dtype, ratio, scales=True)
        return {"q": (stored,), "scale": (scale,), "": (stored, scale)}[self.component]

    def dequantizer(self, operands: tuple[Operand, ...]) -> Dequantizer:
        """The computation from a region's operands to its values."""
        return Dequantizer(self.dtype, operands[0].packed, self.block if len(operands) > 1 else (1, 1))

    def read_shard(self, source: TensorSource, region: Region, operand: Operand, bounds: Bounds) -> NDArray[Any]:
        """Reads the part of a region's operand that one device needs; zeros where the parameter is padded.

        Args:
          bounds: the part, in the operand's coordinates.

        Raises:
          CheckpointError: a scale is not finite, a value in FP8 is NaN, or a packed matrix states another shape than config.json.
        """
        inner = tuple(slice(*b) for b in bounds[self.stacked_dims :])
        shape = tuple(end - begin for begin, end in bounds)
        expert = 0
        if self.routed:
            expert = bounds[self.stacked_dims - 1][0] * self.local_experts + region.local_expert
            if expert >= self.num_experts:
                return np.zeros(shape, operand.dtype)
        name, mapping = region.tensor_name(expert) + operand.suffix, region.mapping
        tensor = self._read(source, region.tensor_name(expert), mapping, operand)
        in_fp8 = tensor.dtype == FP8
        tensor = tensor.view(np.uint8) if in_fp8 else tensor
        if mapping.rows is not None and not (operand.scales and self.block[0] > 1):  # they are reordered within blocks
            shard = tensor[mapping.rows[inner[:-1]]][..., inner[-1]]
        else:
            tensor = tensor.T if mapping.transposed else tensor
            shard = tensor[(None,) * (len(inner) - tensor.ndim)][inner]
        if in_fp8 and not all_finite(shard.view(FP8)):
            raise CheckpointError(name, "a value is NaN. Download the checkpoint again.")
        if shard.shape != shape[self.stacked_dims :]:  # the vocabulary, padded
            shard = np.pad(shard, [(0, p.stop - p.start - n) for p, n in zip(inner, shard.shape, strict=True)])
        shard = shard.astype(operand.dtype, copy=False).reshape(shape)
        # JAX may alias a contiguous array; the file must not stay mapped, and able to change, under a parameter. A
        # transposed one it copies anyway, and faster than NumPy.
        return shard.copy() if shard.flags.c_contiguous and np.may_share_memory(shard, tensor) else shard

    def _read(self, source: TensorSource, name: str, mapping: TensorMapping, operand: Operand) -> NDArray[Any]:
        """The operand in the checkpoint's layout [outputs, inputs]; scales are repeated if the parameter's `block` is smaller."""
        tensor, q = source.read(name + operand.suffix), self.quantization
        if q is not None and operand.scales:
            if not all_finite(tensor):
                raise CheckpointError(
                    name + operand.suffix, "a scale is NaN or infinite. Download the checkpoint again."
                )
            for dim in (0, 1):
                tensor = np.repeat(tensor, q.block[dim] // self.block[dim], axis=dim)
            outputs, inputs = (-(-size // n) for size, n in zip(mapping.stored_shape, self.block, strict=True))
            return tensor[:outputs, :inputs]
        if q is not None and q.shape_suffix and operand.suffix == q.stored_suffix:
            stated = source.read(name + q.shape_suffix).tolist()
            if tuple(stated) != mapping.stored_shape:
                raise CheckpointError(name + q.shape_suffix, f"expected {list(mapping.stored_shape)}, got {stated}.")
        return tensor

    def _inner_bounds(self, mapping: TensorMapping) -> Bounds:
        """The part of one layer (and expert) that a tensor fills."""
        inner = self.shape[self.stacked_dims :]
        index = mapping.index or (slice(None),) * len(inner)
        return tuple(part.indices(size)[:2] for part, size in zip(index, inner, strict=True))

    def _region_shape(self, mapping: TensorMapping) -> tuple[int, ...]:
        stacked = () if self.layers is None else (1,)
        inner = (end - begin for begin, end in self._inner_bounds(mapping))
        return (*stacked, *((self.ep_size,) if self.routed else ()), *inner)


def _uncut(
    block: tuple[int, int], shape: tuple[int, ...], shard_shape: tuple[int, ...], mapping: TensorMapping
) -> tuple[int, int]:
    """The largest part of a block that neither the mesh nor the loader's order of rows cuts."""
    outputs, inputs = (
        length if size == shard else math.gcd(length, shard)
        for length, size, shard in zip(block, shape[-2:], shard_shape[-2:], strict=True)
    )
    return (outputs if mapping.rows is None else 1), inputs
