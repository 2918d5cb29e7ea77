"""Loads a checkpoint's tensors into sharded arrays, one tensor at a time.

A parameter that a single tensor fills is made from it directly. All others (stacked layers, experts, fused projections) are
allocated once, as zeros; a compiled update, to which the parameter is donated, writes each tensor into its region. The host
therefore holds one tensor at most besides the arrays, and a process reads only what its own devices keep. Experts are
divided over devices: one update writes the j-th expert of every device.

Quantized tensors go to the devices as they are stored. The update unpacks and dequantizes them, unless they stay quantized.
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from numpy.typing import NDArray

from jax_mla_cp.checkpoint.check_tensors import check_tensors
from jax_mla_cp.checkpoint.parameter import Bounds, Dequantizer, Operand, Parameter, Region
from jax_mla_cp.checkpoint.progress_bar import log_loaded, log_loading, progress_bar
from jax_mla_cp.checkpoint.tensor_source import TensorSource
from jax_mla_cp.config.model import ModelConfig


def load_params(
    source: TensorSource,
    declared: nnx.State[Any, Any],
    config: ModelConfig,
    mesh: Mesh | None,
    *,
    progress: bool | None = None,
) -> nnx.State[Any, Any]:
    """Loads the parameters of a `Decoder` from a checkpoint.

    Args:
      source: the checkpoint's tensors.
      declared: `nnx.state(Decoder(build))`: parameters whose values are `jax.ShapeDtypeStruct`s with global shapes, and
        whose metadata `spec` says how the mesh divides them. Tensors are cast to the dtypes declared there.
      config: the model's.
      mesh: the mesh that `build.shape` describes; None puts everything on the default device.
      progress: show a progress bar on stderr; None shows it if stderr is a terminal.

    Returns:
      `declared` with `jax.Array`s in place of the declared values.

    Raises:
      CheckpointError: the checkpoint's tensors are not those that `config` describes; nothing has been allocated.
    """
    begin = time.perf_counter()
    flat = dict(nnx.to_flat_state(declared))
    parameters = {path: Parameter.from_variable(path, variable, config, mesh) for path, variable in flat.items()}
    names = check_tensors(source, config, list(parameters.values()))
    nbytes = sum(p.nbytes for p in parameters.values())
    log_loading(nbytes, 1 if mesh is None else mesh.size)
    arrays = zeros([p for p in parameters.values() if not p.is_one_tensor])
    regions = list(_by_layer(parameters.values(), config))
    with progress_bar("loading weights", nbytes, len(regions), "tensor", show=progress) as advance:
        for parameter, region in regions:
            array = _write(source, parameter, region, parameter.operands(region, names), arrays.get(parameter.path))
            arrays[parameter.path] = jax.block_until_ready(array)  # else transfers queue up, and host memory with them
            advance(math.prod(region.shape) * parameter.dtype.itemsize)
    log_loaded(len(names), sum(array.nbytes for array in arrays.values()), time.perf_counter() - begin)
    return nnx.from_flat_state(
        {path: variable.replace(arrays[parameters[path].path]) for path, variable in flat.items()}
    )


def _by_layer(parameters: Iterable[Parameter], config: ModelConfig) -> Iterator[tuple[Parameter, Region]]:
    """Yields all regions in the order of the files: first what belongs to no layer, then layer by layer."""
    parameters = list(parameters)
    for layer in (None, *range(config.num_layers + 1)):  # the layer after the last is the MTP layer
        for parameter in parameters:
            for region in parameter.regions(layer):
                yield parameter, region


def zeros(parameters: list[Parameter]) -> dict[str, jax.Array]:
    """Allocates the parameters on their devices, as zeros, by path."""

    def allocate() -> dict[str, jax.Array]:
        return {p.path: jnp.zeros(p.shape, p.dtype) for p in parameters}

    arrays: dict[str, jax.Array] = jax.jit(allocate, out_shardings={p.path: p.sharding for p in parameters})()
    return arrays


def _write(
    source: TensorSource, parameter: Parameter, region: Region, operands: tuple[Operand, ...], array: jax.Array | None
) -> jax.Array:
    """Writes a region into the parameter's array, which is donated. Without an array, the region becomes the parameter."""
    values = tuple(_read(source, parameter, region, operand) for operand in operands)
    if array is None:
        return values[0]
    update = updater(parameter.sharding, parameter.dequantizer(operands))
    updated: jax.Array = update(array, values, np.asarray(region.start, np.int32))
    return updated


def _read(source: TensorSource, parameter: Parameter, region: Region, operand: Operand) -> jax.Array:
    """Reads a region's operand into a global array [1?, ep_size?, *inner], sharded like the parameter."""
    shape = operand.shape(region)
    shards: dict[Bounds, NDArray[Any]] = {}  # replicas share one copy

    def shard(index: tuple[slice, ...] | None) -> NDArray[Any]:
        index = index or (slice(None),) * len(shape)
        bounds = tuple(i.indices(size)[:2] for i, size in zip(index, shape, strict=True))
        if bounds not in shards:
            shards[bounds] = parameter.read_shard(source, region, operand, bounds)
        return shards[bounds]

    if parameter.sharding is None:
        on_default_device: jax.Array = jax.device_put(shard(None))
        return on_default_device
    return jax.make_array_from_callback(shape, parameter.sharding, shard)


@functools.cache
def updater(sharding: NamedSharding | None, dequantizer: Dequantizer) -> Any:
    """Jitted `(array, operands, start) -> array`, in place; `start` is relative to each device's shard."""

    def update(array: jax.Array, operands: tuple[jax.Array, ...], start: jax.Array) -> jax.Array:
        # As bits: XLA:CPU updates bfloat16 in float32, to which it converts the whole parameter and back, for every tensor.
        bits = jnp.dtype(f"uint{8 * array.dtype.itemsize}")
        whole, region = (lax.bitcast_convert_type(x, bits) for x in (array, dequantizer(*operands)))
        return lax.bitcast_convert_type(lax.dynamic_update_slice(whole, region, list(start)), array.dtype)

    if sharding is not None:
        specs = (sharding.spec, sharding.spec, PartitionSpec())
        update = jax.shard_map(update, mesh=sharding.mesh, in_specs=specs, out_specs=sharding.spec)
    return jax.jit(update, donate_argnums=0)
