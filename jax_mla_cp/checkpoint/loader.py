"""Puts a checkpoint's tensors into sharded arrays, one at a time.

A parameter that one tensor fills is made from it directly. The others (stacked layers, experts, fused projections) are
allocated once, as zeros, and each tensor is written into its place by a compiled update that donates the parameter.
So the host never holds more than one tensor besides the arrays themselves, and a process reads only what its own
devices keep. Experts are divided between devices: one update writes the j-th expert of every device.

Quantized tensors go to the devices as they are stored; the update unpacks and dequantizes them, unless they stay so.
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
from jax_mla_cp.checkpoint.parameter import Decode, Operand, Place, Target
from jax_mla_cp.checkpoint.progress_bar import loading_bar, report_loaded
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
    """The parameters of a `Decoder` from a checkpoint.

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
      CheckpointError: the checkpoint's tensors are not those of `config`; nothing has been allocated.
    """
    begin = time.perf_counter()
    flat = dict(nnx.to_flat_state(declared))
    targets = {path: Target.of(path, param, config, mesh) for path, param in flat.items()}
    names = check_tensors(source, config, list(targets.values()))
    arrays = zeros([target for target in targets.values() if not target.whole])
    places = sum(1 for _ in _by_layer(targets.values(), config))
    with loading_bar(sum(t.nbytes for t in targets.values()), places, show=progress) as advance:
        for target, place in _by_layer(targets.values(), config):
            array = _write(source, target, place, target.operands(place, names), arrays.get(target.path))
            arrays[target.path] = jax.block_until_ready(array)  # else transfers queue up, and host memory with them
            advance(math.prod(place.shape) * target.dtype.itemsize)
    total = sum(array.nbytes for array in arrays.values())
    report_loaded(len(names), total, time.perf_counter() - begin)
    return nnx.from_flat_state({path: param.replace(arrays[targets[path].path]) for path, param in flat.items()})


def _by_layer(targets: Iterable[Target], config: ModelConfig) -> Iterator[tuple[Target, Place]]:
    """In the order of the files: layer by layer, what belongs to no layer first."""
    targets = list(targets)
    for layer in (None, *range(config.num_layers + 1)):  # the one behind the last is for multi-token prediction
        for target in targets:
            for place in target.places(layer):
                yield target, place


def zeros(targets: list[Target]) -> dict[str, jax.Array]:
    """The parameters, on their devices, before anything has been loaded."""

    def make() -> dict[str, jax.Array]:
        return {target.path: jnp.zeros(target.shape, target.dtype) for target in targets}

    made: dict[str, jax.Array] = jax.jit(make, out_shardings={target.path: target.sharding for target in targets})()
    return made


def _write(
    source: TensorSource, target: Target, place: Place, operands: tuple[Operand, ...], parameter: jax.Array | None
) -> jax.Array:
    """The parameter, donated, with what goes to `place`; without one, what goes there is the parameter."""
    parts = tuple(_read(source, target, place, operand) for operand in operands)
    if parameter is None:
        return parts[0]
    update = updater(target.sharding, target.decode(operands))
    updated: jax.Array = update(parameter, parts, np.asarray(place.start, np.int32))
    return updated


def _read(source: TensorSource, target: Target, place: Place, operand: Operand) -> jax.Array:
    """An operand of what goes to `place`, as a global array [1?, ranks?, *inner] divided like the parameter."""
    shape = operand.shape(place)
    parts: dict[tuple[tuple[int, int], ...], NDArray[Any]] = {}  # replicas share one copy

    def part(index: tuple[slice, ...] | None) -> NDArray[Any]:
        index = index or (slice(None),) * len(shape)
        bounds = tuple(i.indices(size)[:2] for i, size in zip(index, shape, strict=True))
        if bounds not in parts:
            parts[bounds] = target.part(source, place, operand, bounds)
        return parts[bounds]

    if target.sharding is None:
        alone: jax.Array = jax.device_put(part(None))
        return alone
    return jax.make_array_from_callback(shape, target.sharding, part)


@functools.cache
def updater(sharding: NamedSharding | None, decode: Decode) -> Any:
    """Jitted `(parameter, operands, start) -> parameter`, in place; `start` counts within each device's own part."""

    def update(parameter: jax.Array, operands: tuple[jax.Array, ...], start: jax.Array) -> jax.Array:
        # As bits: XLA:CPU updates bfloat16 in float32, to which it converts the whole parameter and back, for every tensor.
        bits = jnp.dtype(f"uint{8 * parameter.dtype.itemsize}")
        whole, part = (lax.bitcast_convert_type(x, bits) for x in (parameter, decode(*operands)))
        return lax.bitcast_convert_type(lax.dynamic_update_slice(whole, part, list(start)), parameter.dtype)

    if sharding is not None:
        specs = (sharding.spec, sharding.spec, PartitionSpec())
        update = jax.shard_map(update, mesh=sharding.mesh, in_specs=specs, out_specs=sharding.spec)
    return jax.jit(update, donate_argnums=0)
