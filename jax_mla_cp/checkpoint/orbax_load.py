"""Puts a converted checkpoint into sharded arrays: block by block, while the next blocks are being read.

Orbax restores whole arrays, and its host buffers are as large as a device's part of one: of all layers' experts, a third
of the model. Here TensorStore reads blocks of a few layers or experts into small buffers, in its own threads, and compiled
updates write them into arrays that were allocated once. On a CPU, where a device's memory is the host's, a block is a whole
parameter and its buffer becomes the array. What is read is what this process's devices keep; what only pads a parameter
for the mesh is zero and is not read.
"""

from __future__ import annotations

import collections
import dataclasses
import math
import mmap
import time
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import tensorstore as ts
from flax import nnx
from jax.sharding import Mesh
from numpy.typing import NDArray

from jax_mla_cp.checkpoint.load import updater, zeros
from jax_mla_cp.checkpoint.orbax import Converted
from jax_mla_cp.checkpoint.progress import loading_bar, report_loaded
from jax_mla_cp.checkpoint.source import CheckpointError
from jax_mla_cp.checkpoint.target import Decode, Target
from jax_mla_cp.config.model import ModelConfig

_BLOCK = 32 << 20
"""One layer of one expert, or of what is no expert, may be larger."""
_IN_FLIGHT = 128 << 20
"""Bytes of blocks that are read or put on the devices at a time; a block that is larger is alone."""

Bounds = tuple[tuple[int, int], ...]


@dataclasses.dataclass(frozen=True)
class _Block:
    """A part of a parameter: some layers of everything, or some of every rank's experts of one layer."""

    target: Target
    shape: tuple[int, ...]
    start: tuple[int, ...]
    """Its offset within each rank's part of the parameter."""

    @property
    def whole(self) -> bool:
        return self.shape == self.target.shape

    def parts(self) -> dict[Any, Bounds]:
        """Device -> its part, in the block's own coordinates. None stands for the default device."""
        if self.target.sharding is None:
            return {None: tuple((0, size) for size in self.shape)}
        indices = self.target.sharding.addressable_devices_indices_map(self.shape)
        return {device: _bounds(index or (), self.shape) for device, index in indices.items()}

    @property
    def nbytes(self) -> int:
        """Of what this process's devices keep, replicas once."""
        kept = set(self.parts().values())
        return sum(math.prod(end - begin for begin, end in part) for part in kept) * self.target.dtype.itemsize

    def in_parameter(self, part: Bounds) -> Bounds:
        """Where a device's part lies in the whole parameter."""
        bounds = [(begin + at, end + at) for (begin, end), at in zip(part, self.start, strict=True)]
        if self.target.routed:
            per_rank, taken = self.target.shape[1] // self.target.ranks, self.shape[1] // self.target.ranks
            begin = part[1][0] // taken * per_rank + self.start[1]
            bounds[1] = (begin, begin + taken)
        return tuple(bounds)


def load_converted(
    checkpoint: Converted,
    declared: nnx.State[Any, Any],
    config: ModelConfig,
    mesh: Mesh | None,
    *,
    progress: bool | None = None,
) -> nnx.State[Any, Any]:
    """The parameters of a `Decoder` from a converted checkpoint; as `load_params`, bit for bit.

    Args:
      checkpoint: from `open_converted`.

    Raises:
      CheckpointError: chunks that are damaged, or parameters that are not the declared ones.
    """
    begin = time.perf_counter()
    flat = dict(nnx.to_flat_state(declared))
    targets = {path: Target.of(path, param, config, mesh) for path, param in flat.items()}
    _check(list(targets.values()), checkpoint)
    stores = {t.path: ts.cast(checkpoint.open(t.path), ts.dtype(t.dtype)) for t in targets.values()}
    most = block_bytes(jax.devices()[0] if mesh is None else mesh.devices.flat[0])
    blocks = [block for target in targets.values() for block in _blocks(target, most)]
    # The first block of each parameter tells whether it is all of it.
    arrays = zeros([block.target for block in blocks if not block.whole and not any(block.start)])
    waiting, reading = collections.deque(blocks), collections.deque[_Reading]()
    with loading_bar(sum(t.nbytes for t in targets.values()), len(blocks), show=progress) as advance:
        while waiting or reading:
            while waiting and (not reading or sum(r.nbytes for r in reading) + waiting[0].nbytes <= _IN_FLIGHT):
                reading.append(_Reading(stores[waiting[0].target.path], waiting.popleft()))
            block = reading[0].block
            try:
                array = reading[0].result()
            except ValueError as error:
                raise checkpoint.read_error(error) from error
            nbytes, path = array.nbytes, block.target.path
            if not block.whole:
                update = updater(block.target.sharding, Decode(block.target.dtype))
                array = update(arrays[path], (array,), np.asarray(block.start, np.int32))
            arrays[path] = jax.block_until_ready(array)  # else transfers queue up, and host memory with them
            reading.popleft()
            advance(nbytes)
    report_loaded(len(arrays), sum(array.nbytes for array in arrays.values()), time.perf_counter() - begin)
    return nnx.from_flat_state({path: param.replace(arrays[targets[path].path]) for path, param in flat.items()})


def block_bytes(device: jax.Device) -> int | None:
    """Most bytes of a block in this process's memory; None: no limit, that memory is the devices'."""
    return None if device.platform == "cpu" else _BLOCK


def _check(targets: list[Target], checkpoint: Converted) -> None:
    """Names and shapes; a declared parameter may be padded, to a multiple of the devices that divide it."""
    wanted, stored = {t.path: t for t in targets}, checkpoint.arrays
    wrong = [f"{name}: missing" for name in sorted(wanted.keys() - stored.keys())]
    # The layer for multi-token prediction is stored where there is one, and read where it is asked for.
    wrong += [f"{name}: surplus" for name in sorted(stored.keys() - wanted.keys()) if not name.startswith("mtp.")]
    for name in sorted(wanted.keys() & stored.keys()):
        target, got = wanted[name], stored[name].shape
        local = target.sharding.shard_shape(target.shape) if target.sharding else target.shape
        ways = [size // part for size, part in zip(target.shape, local, strict=True)]
        if len(got) != len(ways) or target.shape != tuple(-(-n // w) * w for n, w in zip(got, ways, strict=True)):
            wrong.append(f"{name}: expected {list(target.shape)}, got {list(got)}")
    if wrong:
        raise CheckpointError(
            "model",
            f"{checkpoint.directory} has parameters that are not this model's:" + "".join(f"\n  {w}" for w in wrong),
        )


def _blocks(target: Target, most: int | None) -> Iterator[_Block]:
    """A parameter's blocks of at most so many bytes, in the order of the files. None: all of it at once."""
    inner = target.shape[target.leading :]
    if target.layers is None or most is None:
        yield _Block(target, target.shape, (0,) * len(target.shape))
        return
    slots = target.shape[1] // target.ranks if target.routed else 1
    local = target.sharding.shard_shape(target.shape) if target.sharding else target.shape
    one = math.prod(local) // (local[0] * slots) * target.dtype.itemsize * _distinct(target)
    most_slots = min(max(most // one, 1), slots)
    most_layers = max(most // (one * slots), 1) if most_slots == slots else 1
    for layer in range(0, target.shape[0], most_layers):
        layers = min(most_layers, target.shape[0] - layer)
        if not target.routed:
            yield _Block(target, (layers, *inner), (layer, *(0 for _ in inner)))
            continue
        for slot in range(0, slots, most_slots):
            taken = min(most_slots, slots - slot) * target.ranks
            yield _Block(target, (layers, taken, *inner), (layer, slot, *(0 for _ in inner)))


def _distinct(target: Target) -> int:
    """Different parts of the parameter that this process's devices keep."""
    if target.sharding is None:
        return 1
    indices = target.sharding.addressable_devices_indices_map(target.shape)
    return len({_bounds(index or (), target.shape) for index in indices.values()})


class _Reading:
    """A block that is being read."""

    def __init__(self, store: ts.TensorStore, block: _Block):
        self.block = block
        self.nbytes = block.nbytes
        # Replicas share one buffer.
        self._reads = {part: _read(store, block.in_parameter(part)) for part in set(block.parts().values())}

    def result(self) -> jax.Array:
        """The block, divided like its parameter."""
        for _, read in self._reads.values():
            if read is not None:
                read.result()
        block = self.block
        if block.target.sharding is None:
            alone: jax.Array = jax.device_put(next(iter(self._reads.values()))[0])
            return alone
        return jax.make_array_from_callback(
            block.shape, block.target.sharding, lambda index: self._reads[_bounds(index or (), block.shape)][0]
        )


def _read(store: ts.TensorStore, bounds: Bounds) -> tuple[NDArray[Any], ts.WriteFutures | None]:
    """A buffer, and what fills it with the stored part; the rest is padding, and zero."""
    shape = tuple(end - begin for begin, end in bounds)
    there = tuple(max(min(end, size) - begin, 0) for (begin, end), size in zip(bounds, store.shape, strict=True))
    buffer = _buffer(shape, store.dtype.numpy_dtype)
    if not all(there):
        return buffer, None
    stored = store[tuple(slice(begin, begin + size) for (begin, _), size in zip(bounds, there, strict=True))]
    into = ts.array(buffer[tuple(map(slice, there))])
    return buffer, into.write(stored[ts.d[:].translate_to[0]])


def _buffer(shape: tuple[int, ...], dtype: np.dtype[Any]) -> NDArray[Any]:
    """Zeros, aligned so that JAX takes them over on a CPU as they are, which it does at multiples of 64 bytes.

    Not NumPy's memory: NumPy asks for huge pages, and in a memory full of page cache, as after reading a checkpoint, Linux
    may move pages about for seconds to make room for them.
    """
    count = math.prod(shape)
    memory = mmap.mmap(-1, max(count * dtype.itemsize, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return np.frombuffer(memory, dtype, count).reshape(shape)


def _bounds(index: tuple[slice, ...], shape: tuple[int, ...]) -> Bounds:
    index = index or (slice(None),) * len(shape)
    return tuple(i.indices(size)[:2] for i, size in zip(index, shape, strict=True))
