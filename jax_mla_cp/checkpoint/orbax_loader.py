"""Loads a converted checkpoint into sharded arrays, one block at a time, while the next blocks are being read.

Orbax restores whole arrays: its host buffers are as large as a device's shard of one, and a shard of all layers' experts is a
third of the model. Here TensorStore's threads read blocks of a few layers or experts into small buffers, and compiled updates
write them into arrays that were allocated once. On a CPU, where device memory is host memory, a block is a whole parameter
and its buffer becomes the array. A process reads only what its devices keep; the padding that a mesh needs is zero and is
not read.

A conversion does not know the mesh, so it keeps matrices in FP8 whose blocks this one cuts (model/fp8_blocks.py). Those are
dequantized by the host as they are read.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import math
import mmap
import time
from collections.abc import Callable, Iterator
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
from jax_mla_cp.config.quantization import FP8

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
    stores = {p.path: _open(checkpoint, p) for p in parameters.values()}
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
    declared = {p.path: p for p in parameters}
    stored: dict[str, tuple[int, ...]] = {}
    for name, array in checkpoint.arrays.items():
        matrix, _, component = name.rpartition(".")
        if matrix not in declared:
            stored[name] = array.shape
        elif component == "q":
            stored[matrix] = array.shape
    mistakes = [f"{name}: missing" for name in sorted(declared.keys() - stored.keys())]
    # The MTP layer is stored if the model has one, and loaded if asked for.
    extra = (name for name in stored.keys() - declared.keys() if not name.startswith("mtp."))
    mistakes += [f"{name}: unexpected" for name in sorted(extra)]
    for name in sorted(declared.keys() & stored.keys()):
        shape, stored_shape = declared[name].shape, stored[name]
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


Read = Callable[[Bounds], Callable[[], NDArray[Any]]]
"""Starts to read a part of a parameter; the result waits for it."""


class _BlockRead:
    """A block that is being read."""

    def __init__(self, read: Read, block: _Block):
        self.block = block
        self.nbytes = block.nbytes
        # Replicas share one buffer.
        self._reads = {shard: read(block.in_parameter(shard)) for shard in block.local_shards()}

    def result(self) -> jax.Array:
        """Waits for the block. Returns it, sharded like its parameter."""
        shards = {shard: wait() for shard, wait in self._reads.items()}
        shape, sharding = self.block.shape, self.block.parameter.sharding
        if sharding is None:
            on_default_device: jax.Array = jax.device_put(next(iter(shards.values())))
            return on_default_device
        return jax.make_array_from_callback(shape, sharding, lambda index: shards[_bounds(index or (), shape)])


def _open(checkpoint: ConvertedCheckpoint, parameter: Parameter) -> Read:
    """Opens a parameter, as it is stored, or as a matrix in FP8 that is to be dequantized."""
    path, dtype = parameter.path, parameter.dtype
    if path in checkpoint.arrays:
        return functools.partial(_read, ts.cast(checkpoint.open(path), ts.dtype(dtype)))
    assert parameter.quantization is not None, "_check has seen to it"
    q, scale = (checkpoint.open(f"{path}.{component}") for component in ("q", "scale"))
    return functools.partial(_read_dequantized, q, scale, parameter.quantization.block, dtype)


def _read_dequantized(
    q: ts.TensorStore, scale: ts.TensorStore, block: tuple[int, int], dtype: np.dtype[Any], bounds: Bounds
) -> Callable[[], NDArray[Any]]:
    """Starts to read a part of a matrix in FP8, which may begin and end within blocks. It is `q * scale`, rounded once to `dtype`."""
    rows_and_columns = list(zip(bounds[-2:], block, strict=True))
    blocks = (*bounds[:-2], *((begin // n, -(-end // n)) for (begin, end), n in rows_and_columns))
    rows, columns = (np.arange(*part) // n - part[0] // n for part, n in rows_and_columns)
    wait_q, wait_scale = _read(q, bounds), _read(scale, blocks)

    def wait() -> NDArray[Any]:
        values, scales = wait_q().view(FP8), wait_scale()
        out = _buffer(values.shape, dtype)
        for matrix in np.ndindex(values.shape[:-2]):  # one at a time: the float32 numbers are temporary
            out[matrix] = values[matrix].astype(np.float32) * scales[matrix].astype(np.float32)[np.ix_(rows, columns)]
        return out

    return wait


def _read(store: ts.TensorStore, bounds: Bounds) -> Callable[[], NDArray[Any]]:
    """Starts to read a part of an array; zeros where there is padding."""
    shape = tuple(end - begin for begin, end in bounds)
    stored_shape = tuple(max(min(end, size) - begin, 0) for (begin, end), size in zip(bounds, store.shape, strict=True))
    buffer = _buffer(shape, store.dtype.numpy_dtype)
    if not all(stored_shape):
        return lambda: buffer
    stored = store[tuple(slice(begin, begin + size) for (begin, _), size in zip(bounds, stored_shape, strict=True))]
    into = ts.array(buffer[tuple(map(slice, stored_shape))])
    read = into.write(stored[ts.d[:].translate_to[0]])

    def wait() -> NDArray[Any]:
        read.result()
        return buffer

    return wait


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
