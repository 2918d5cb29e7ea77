"""Random weights of a model on a mesh. Each shard is made on its own device."""

from __future__ import annotations

import dataclasses
import functools
import math
import zlib
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jax_mla_cp.bench.data import fill
from jax_mla_cp.mesh import mesh_shape
from jax_mla_cp.model.build import Build

_FAVOR = 10.0  # above any score: sigmoids are below 1
_FP8_SCALE = 2.0**-10  # of FP8 matrices, so that the stored values use e4m3's range as in a real checkpoint


@dataclasses.dataclass(frozen=True)
class _Parameter:
    """One parameter's distribution: N(mean, scale^2), or the mean alone if scale is 0; uint8 is FP8's bytes."""

    name: str
    shape: tuple[int, ...]
    dtype: jnp.dtype
    spec: PartitionSpec
    mean: float
    scale: float


def random_params(module: nnx.Module, mesh: Mesh) -> Any:
    """Makes the state of a module whose parameters are declared, with N(0, 1 / fan in) weights and norms of 1.

    The router's bias is 0: tokens spread evenly over the experts, as they do with a trained bias. A shard's values depend on its
    parameter's name and its place in it, so that replicas are equal.
    """
    state = nnx.state(module)
    leaves, tree = jax.tree_util.tree_flatten_with_path(state, is_leaf=_is_variable)
    parameters = tuple(_parameter(path, leaf) for path, leaf in leaves)
    shardings = [NamedSharding(mesh, p.spec) for p in parameters]
    shapes = tuple(s.shard_shape(p.shape) for s, p in zip(shardings, parameters, strict=True))
    shards: list[list[jax.Array]] = [[] for _ in parameters]
    made: dict[tuple[Any, ...], list[jax.Array]] = {}  # on CPU devices, many hold the same shards
    for device in _local(mesh):
        places = tuple(_place(s, p.shape, device) for s, p in zip(shardings, parameters, strict=True))
        if places not in made:
            seeds = [zlib.crc32(f"{p.name} {place}".encode()) for p, place in zip(parameters, places, strict=True)]
            made[places] = _make(parameters, _zeros(parameters, shapes), jnp.array(seeds, jnp.uint32))
        for i, value in enumerate(made[places]):
            shards[i].append(jax.device_put(value, device))
    whole = [
        jax.make_array_from_single_device_arrays(p.shape, s, parts)
        for p, s, parts in zip(parameters, shardings, shards, strict=True)
    ]
    new = [leaf.replace(value) for (_, leaf), value in zip(leaves, whole, strict=True)]
    return jax.tree_util.tree_unflatten(tree, new)


def favor_first_rank(params: Any, build: Build, mesh: Mesh) -> Any:
    """Changes the router to prefer the experts of the expert group's first device: that device's worst case.

    Every token takes as many of them as group-limited routing allows. If the router has no bias, all scores are made equal; of
    equal scores the first are chosen.
    """
    experts = build.padded_experts // build.axes.size(build.ep_axes)

    def replace(path: tuple[Any, ...], leaf: nnx.Variable[Any]) -> nnx.Variable[Any]:
        name, value = _name(path), leaf.get_value()
        if name.endswith("mlp.bias"):
            new = (jnp.arange(value.shape[-1]) < experts) * _FAVOR
        elif name.endswith("mlp.router") and not build.config.routing_bias:
            new = jnp.zeros(())
        else:
            return leaf
        local = jnp.broadcast_to(new, value.shape).astype(value.dtype)
        return leaf.replace(replicated(local, mesh))

    return jax.tree_util.tree_map_with_path(replace, params, is_leaf=_is_variable)


def replicated(local: jax.Array, mesh: Mesh, spec: PartitionSpec | None = None) -> jax.Array:
    """Makes an array each of whose shards is `local`; fully replicated without a `spec`."""
    sharding = NamedSharding(mesh, spec or PartitionSpec())
    parts = [jax.device_put(local, device) for device in _local(mesh)]
    shape = list(local.shape)
    for axis, names in enumerate(sharding.spec):
        for name in (names,) if isinstance(names, str) else names or ():
            shape[axis] *= getattr(mesh_shape(mesh), name)
    return jax.make_array_from_single_device_arrays(tuple(shape), sharding, parts)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _zeros(parameters: tuple[_Parameter, ...], shapes: tuple[tuple[int, ...], ...]) -> list[jax.Array]:
    return [jnp.zeros(shape, p.dtype) for p, shape in zip(parameters, shapes, strict=True)]


@functools.partial(jax.jit, static_argnums=0, donate_argnums=1)
def _make(parameters: tuple[_Parameter, ...], shards: list[jax.Array], seeds: jax.Array) -> list[jax.Array]:
    """Makes one device's shards in one program: many small programs would compile for longer than they run."""
    return [
        jnp.full_like(shard, p.mean) if p.scale == 0 else fill(shard, jax.random.key(seed), p.scale)
        for p, shard, seed in zip(parameters, shards, seeds, strict=True)
    ]


def _parameter(path: tuple[Any, ...], leaf: nnx.Variable[Any]) -> _Parameter:
    name, value = _name(path), leaf.get_value()
    parts = name.split(".")
    in_fp8 = value.dtype == jnp.uint8
    if in_fp8:
        parts.pop()  # "q"
    # Matrices have their inputs last; these three, which are never quantized, have them first.
    fan_in = value.shape[-2 if parts[-1] in ("head", "router", "project") else -1]
    mean, scale = 0.0, 1 / math.sqrt(fan_in)
    if "norm" in parts[-1]:
        mean, scale = 1.0, 0.0
    elif parts[-1] == "bias":
        scale = 0.0
    elif parts[-1] == "embed":
        scale = 1.0
    elif parts[-1] == "scale":
        mean, scale = _FP8_SCALE, 0.0
    elif in_fp8:
        scale /= _FP8_SCALE
    return _Parameter(name, value.shape, jnp.dtype(value.dtype), leaf.get_metadata("spec"), mean, scale)


def _local(mesh: Mesh) -> list[jax.Device]:
    """The mesh's devices in this process."""
    return [device for device in mesh.devices.flat if device.process_index == jax.process_index()]


def _place(sharding: NamedSharding, shape: tuple[int, ...], device: jax.Device) -> tuple[tuple[int, int], ...]:
    """The part of the array on a device, as (start, stop) per dimension."""
    index = sharding.devices_indices_map(shape)[device]
    return tuple(part.indices(size)[:2] for part, size in zip(index, shape, strict=True))


def _is_variable(x: Any) -> bool:
    return isinstance(x, nnx.Variable)


def _name(path: tuple[Any, ...]) -> str:
    return ".".join(str(getattr(key, "key", getattr(key, "name", key))) for key in path)
