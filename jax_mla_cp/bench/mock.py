"""One rank's program of many GPUs on a single one: JAX's mocked topology, with stand-ins for the collectives' results.

`jax_mock_gpu_topology` makes one GPU believe that it is the first of many. It compiles the real sharded program and runs
this device's part of it; its collectives return at once and leave their results undefined, mostly zeros, on which kernels
run faster than on real data. `MockAxes` keeps every collective in the program and chooses, by a number that only the running
device knows, a stand-in for its result:

- psum and psum_scatter: pseudo-random numbers of variance 1;
- all_gather: this device's own part in its place, and in the others' pseudo-random numbers (integers, that is expert ids: its own).

The numbers are hashes of their indices, which the kernel that reads the collective's result computes as it goes: the real
program's reads and writes, and no others. (Were a device's own part of a sum its stand-in, XLA would copy it first.)
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import Primitive
from jax.interpreters import mlir

from jax_mla_cp import platform as devices
from jax_mla_cp.mesh import AXES, Axes, MeshShape
from jax_mla_cp.model.build import Build

_MOCKED = {"--xla_gpu_shard_autotuning": "false"}  # otherwise the first compilation waits for the other processes
_PROFILED = {"--xla_gpu_enable_command_buffer": ""}


def start(platform: str, topology: MeshShape | None, *, profile: bool = False) -> None:
    """Sets up JAX, before its first use: for one device, or as the first device of a mocked `topology`.

    On CPU the topology's devices are virtual, and their collectives real.

    Args:
      profile: turn CUDA graphs off, because a trace doesn't tell the kernels inside of them apart.

    Raises:
      ConfigError: there is no GPU, or JAX has started already.
    """
    if platform == "cuda":
        devices.add_xla_flags((_MOCKED if topology else {}) | (_PROFILED if profile else {}))
        if topology:
            jax.config.update("jax_mock_gpu_topology", f"1x{topology.devices}x1")
    devices.setup("cpu" if platform == "cpu" else "cuda", topology.devices if topology else 1)


def is_mocked() -> bool:
    """True if this process runs as one device of a mocked topology. On CPU all devices run, and collectives are real."""
    return jax.local_device_count() < jax.device_count() and not jax.distributed.is_initialized()


@dataclasses.dataclass(frozen=True)
class MockAxes(Axes):
    """Collectives that return stand-ins, of the real results' types, on the devices before number `real_from`."""

    real_from: int = 0

    def psum(self, x: jax.Array, axes: str | tuple[str, ...]) -> jax.Array:
        if not self.shape:
            return x
        total = super().psum(x, axes)
        return self._choose(total, noise(total.shape, total.dtype))

    def all_gather(self, x: jax.Array, axes: str | tuple[str, ...], *, dim: int = 0) -> jax.Array:
        if not self.shape:
            return x
        gathered = super().all_gather(x, axes, dim=dim)
        if jnp.issubdtype(x.dtype, jnp.floating):
            others = noise(gathered.shape, x.dtype)
        else:
            others = jnp.concatenate([x] * self.size(axes), axis=dim)
        standin = lax.dynamic_update_slice_in_dim(_like(others, x), x, self.index(axes) * x.shape[dim], dim)
        return self._choose(gathered, standin)

    def psum_scatter(self, x: jax.Array, axes: str | tuple[str, ...]) -> jax.Array:
        if not self.shape:
            return x
        scattered = super().psum_scatter(x, axes)
        return self._choose(scattered, noise(scattered.shape, scattered.dtype))

    def _choose(self, real: jax.Array, standin: jax.Array) -> jax.Array:
        """Selects `real` from device number `real_from` on. XLA can't know which device will run its program."""
        is_real = lax.axis_index(AXES) >= self.real_from
        return _like(jnp.where(is_real, real, standin), real)


def noise(shape: tuple[int, ...], dtype: jax.typing.DTypeLike) -> jax.Array:
    """Uniform numbers in [-1.7, 1.7] (variance 1), hashed from the index: a few integer operations and no memory, unlike jax.random."""
    index = jnp.zeros(shape, jnp.uint32)
    for axis, size in enumerate(shape):
        index = index * jnp.uint32(size) + lax.broadcasted_iota(jnp.uint32, shape, axis)
    index *= jnp.uint32(0x9E3779B1)
    index ^= index >> 15
    index *= jnp.uint32(0x85EBCA77)
    return ((index >> 8).astype(jnp.float32) * (3.4 / (1 << 24)) - 1.7).astype(dtype)


# A stand-in differs between devices where the collective's result does not, and shard_map's types say so. This identity
# gives it the type of the result that it stands for: true in the only process there is.
_like_p = Primitive("mock_like")
_like_p.def_abstract_eval(lambda x, like: x.update(manual_axis_type=like.manual_axis_type))
mlir.register_lowering(_like_p, lambda ctx, x, like: [x])


def _like(x: jax.Array, like: jax.Array) -> jax.Array:
    return _like_p.bind(x, like)


@dataclasses.dataclass(frozen=True)
class MockBuild(Build):
    """A build with the collectives of `MockAxes`; `real_from` 0 makes all of them real."""

    real_from: int = 0

    @property
    def axes(self) -> Axes:
        return MockAxes(self.shape, self.real_from)


def mock_build(*, mocked: bool, **build: Any) -> MockBuild:
    """Makes a build from `Build`'s arguments. With `mocked`, no device has real collectives; otherwise all have."""
    made = MockBuild(**build)
    return dataclasses.replace(made, real_from=(made.shape or MeshShape()).devices if mocked else 0)
