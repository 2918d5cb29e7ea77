"""Loads a converted checkpoint into sharded arrays, one block at a time, while the next blocks are being read.

Orbax restores whole arrays: its host buffers are as large as a device's shard of one, and a shard of all layers' experts is a
third of the model. Here TensorStore's threads read blocks of a few layers or experts into small buffers, and compiled updates
write them into arrays that were allocated once. On a CPU, where device memory is host memory, a block is a whole parameter
and its buffer becomes the array. A process reads only what its devices keep; the padding that a mesh needs is zero and is
not read.
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

from jax_mla_cp.checkpoint.errors import CheckpointError
from jax_mla_cp.checkpoint.loader import updater, zeros
from jax_mla_cp.checkpoint.orbax import ConvertedCheckpoint
from jax_mla_cp.checkpoint.parameter import Bounds, Dequantizer, Parameter
from jax_mla_cp.checkpoint.progress_bar import log_loaded, log_loading, progress_bar
from jax_mla_cp.config.model import ModelConfig

_BLOCK_BYTES = 32 << 20
"""Size of a block. The smallest block, one layer of a parameter or one expert of it, may be larger."""
_IN_FLIGHT_BYTES = 128 << 20
"""Total size of the blocks that are being read or copied to the devices; a larger block is processed alone."""


@dataclasses.dataclass(frozen=True)
class _Block:
    """A part of a parameter: a range of its layers; or, of one layer, a range of every rank's experts."""

    parameter: Parameter
    shape: tuple[int, ...]
    start: tuple[int, ...]
    """Offset within each rank's shard of the parameter."""

    @property
    def is_whole_parameter(self) -> bool:
        return self.shape == self.parameter.shape

    def local_shards(self) -> set[Bounds]:
        """The shards that this process's devices keep, in the block's coordinates; replicas once."""
        if self.parameter.sharding is None:
            return {tuple((0, size) for size in self.shape)}
        indices = self.parameter.sharding.addressable_devices_indices_map(self.shape)
        return {_bounds(index or (), self.shape) for index in indices.values()}

    @property
    def nbytes(self) -> int:
        """Total size of the local shards."""
        elements = sum(math.prod(end - begin for begin, end in shard) for shard in self.local_shards())
        return elements * self.parameter.dtype.itemsize

    def in_parameter(self, shard: Bounds) -> Bounds:
        """Converts a shard's bounds from the block's coordinates to the parameter's."""
        bounds = [(begin + offset, end + offset) for (begin, end), offset in zip(shard, self.start, strict=True)]
        if self.parameter.routed:
            experts = self.shape[1] // self.parameter.ep_size
            begin = shard[1][0] // experts * self.parameter.local_experts + self.start[1]
            bounds[1] = (begin, begin + experts)
        return tuple(bounds)


def load_converted(
    checkpoint: ConvertedCheckpoint,
    declared: nnx.State[Any, Any],
    config: ModelConfig,
    mesh: Mesh | None,
    *,
    progress: bool | None = None,
) -> nnx.State[Any, Any]:
    """Loads the parameters of a `Decoder` from a converted checkpoint; the result is `load_params`', bit for bit.

    Args:
      checkpoint: from `open_converted`.

    Raises:
      CheckpointError: a chunk is damaged, or the stored parameters are not the declared ones.
    """
    begin = time.perf_counter()
    flat = dict(nnx.to_flat_state(declared))
    parameters = {path: Parameter.from_variable(path, variable, config, mesh) for path, variable in flat.items()}
    _check(list(parameters.values()), checkpoint)
    stores = {p.path: ts.cast(checkpoint.open(p.path), ts.dtype(p.dtype)) for p in parameters.values()}
    max_bytes = block_bytes(jax.devices()[0] if mesh is None else mesh.devices.flat[0])
    blocks = [block for parameter in parameters.values() for block in _blocks(parameter, max_bytes)]
    # The first block of each parameter tells whether it is all of it.
    arrays = zeros([block.parameter for block in blocks if not block.is_whole_parameter and not any(block.start)])
    waiting, reads = collections.deque(blocks), collections.deque[_BlockRead]()
    nbytes = sum(p.nbytes for p in parameters.values())
    log_loading(nbytes, 1 if mesh is None else mesh.size)
    with progress_bar("loading weights", nbytes, len(blocks), "block", show=progress) as advance:
        while waiting or reads:
            while waiting and (not reads or sum(r.nbytes for r in reads) + waiting[0].nbytes <= _IN_FLIGHT_BYTES):
                reads.append(_BlockRead(stores[waiting[0].parameter.path], waiting.popleft()))
            block = reads[0].block
            parameter = block.parameter
            try:
                array = reads[0].result()
            except ValueError as error:
                raise checkpoint.read_error(error) from error
            read_bytes = array.nbytes
            if not block.is_whole_parameter:
                update = updater(parameter.sharding, Dequantizer(parameter.dtype))
                array = update(arrays[parameter.path], (array,), np.asarray(block.start, np.int32))
            arrays[parameter.path] = jax.block_until_ready(array)  # else transfers queue up, and host memory with them
            reads.popleft()
            advance(read_bytes)
    log_loaded(len(arrays), sum(array.nbytes for array in arrays.values()), time.perf_counter() - begin)
    return nnx.from_flat_state(
        {path: variable.replace(arrays[parameters[path].path]) for path, variable in flat.items()}
    )


def block_bytes(device: jax.Device) -> int | None:
    """Maximum size of a block in host memory; None: unlimited, because host memory is device memory."""
    return None if device.platform == "cpu" else _BLOCK_BYTES


def _check(parameters: list[Parameter], checkpoint: ConvertedCheckpoint) -> None:
    """Compares names and shapes. A declared parameter may be padded to a multiple of the devices that divide it."""
    declared, stored = {p.path: p for p in parameters}, checkpoint.arrays
    mistakes = [f"{name}: missing" for name in sorted(declared.keys() - stored.keys())]
    # The MTP layer is stored if the model has one, and loaded if asked for.
    extra = (name for name in stored.keys() - declared.keys() if not name.startswith("mtp."))
    mistakes += [f"{name}: unexpected" for name in sorted(extra)]
    for name in sorted(declared.keys() & stored.keys()):
        shape, stored_shape = declared[name].shape, stored[name].shape
        ways = [size // shard for size, shard in zip(shape, declared[name].shard_shape, strict=True)]
        if len(stored_shape) != len(ways) or shape != tuple(
            -(-n // w) * w for n, w in zip(stored_shape, ways, strict=True)
        ):
            mistakes.append(f"{name}: expected {list(shape)}, got {list(stored_shape)}")
    if mistakes:
        raise CheckpointError(
            "model",
            f"{checkpoint.directory}: its parameters are not those of this model:"
            + "".join(f"\n  {mistake}" for mistake in mistakes),
        )


def _blocks(parameter: Parameter, max_bytes: int | None) -> Iterator[_Block]:
    """Divides a parameter into blocks of at most `max_bytes`, in the order of the files; None: into a single block."""
    whole = _Block(parameter, parameter.shape, (0,) * len(parameter.shape))
    if parameter.layers is None or max_bytes is None:
        yield whole
        return
    inner = parameter.shape[parameter.stacked_dims :]
    origin = (0,) * len(inner)
    expert_bytes = whole.nbytes // (parameter.shape[0] * parameter.local_experts)
    max_experts = min(max(max_bytes // expert_bytes, 1), parameter.local_experts)
    all_experts = max_experts == parameter.local_experts
    max_layers = max(max_bytes // (expert_bytes * parameter.local_experts), 1) if all_experts else 1
    for layer in range(0, parameter.shape[0], max_layers):
        layers = min(max_layers, parameter.shape[0] - layer)
        if not parameter.routed:
            yield _Block(parameter, (layers, *inner), (layer, *origin))
            continue
        for expert in range(0, parameter.local_experts, max_experts):
            experts = min(max_experts, parameter.local_experts - expert) * parameter.ep_size
            yield _Block(parameter, (layers, experts, *inner), (layer, expert, *origin))


class _BlockRead:
    """A block that is being read."""

    def __init__(self, store: ts.TensorStore, block: _Block):
        self.block = block
        self.nbytes = block.nbytes
        # Replicas share one buffer.
        self._reads = {shard: _read(store, block.in_parameter(shard)) for shard in block.local_shards()}

    def result(self) -> jax.Array:
        """Waits for the block. Returns it, sharded like its parameter."""
        for _, read in self._reads.values():
            if read is not None:
                read.result()
        shape, sharding = self.block.shape, self.block.parameter.sharding
        if sharding is None:
            on_default_device: jax.Array = jax.device_put(next(iter(self._reads.values()))[0])
            return on_default_device
        return jax.make_array_from_callback(shape, sharding, lambda index: self._reads[_bounds(index or (), shape)][0])


def _read(store: ts.TensorStore, bounds: Bounds) -> tuple[NDArray[Any], ts.WriteFutures | None]:
    """Starts to read a part of an array. Returns its buffer, zero where there is padding, and the future that fills it."""
    shape = tuple(end - begin for begin, end in bounds)
    stored_shape = tuple(max(min(end, size) - begin, 0) for (begin, end), size in zip(bounds, store.shape, strict=True))
    buffer = _buffer(shape, store.dtype.numpy_dtype)
    if not all(stored_shape):
        return buffer, None
    stored = store[tuple(slice(begin, begin + size) for (begin, _), size in zip(bounds, stored_shape, strict=True))]
    into = ts.array(buffer[tuple(map(slice, stored_shape))])
    return buffer, into.write(stored[ts.d[:].translate_to[0]])


def _buffer(shape: tuple[int, ...], dtype: np.dtype[Any]) -> NDArray[Any]:
    """Allocates zeros with the alignment (64 bytes) at which JAX adopts a buffer on a CPU without a copy.

    Not with NumPy: it asks for huge pages, and while memory is full of page cache, as after reading a checkpoint, Linux may
    move pages for seconds to make room for them.
    """
    count = math.prod(shape)
    memory = mmap.mmap(-1, max(count * dtype.itemsize, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return np.frombuffer(memory, dtype, count).reshape(shape)


def _bounds(index: tuple[slice, ...], shape: tuple[int, ...]) -> Bounds:
    index = index or (slice(None),) * len(shape)
    return tuple(i.indices(size)[:2] for i, size in zip(index, shape, strict=True))
