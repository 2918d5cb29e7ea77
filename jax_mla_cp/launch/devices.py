"""The devices of a program, and the other processes that share its mesh."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Literal

from jax.sharding import Mesh

from jax_mla_cp import platform
from jax_mla_cp.config.errors import ConfigError
from jax_mla_cp.distributed.cluster import join
from jax_mla_cp.distributed.compile_cache import write_own_compile_cache
from jax_mla_cp.distributed.connect import connect
from jax_mla_cp.distributed.follower import Follower
from jax_mla_cp.distributed.leader import Leader
from jax_mla_cp.distributed.member import Member
from jax_mla_cp.launch.options import LaunchOptions
from jax_mla_cp.mesh import MeshShape, make_mesh


@dataclasses.dataclass(frozen=True)
class Devices:
    """The started platform, and the processes that share the mesh."""

    platform: Literal["cpu", "cuda"]
    mesh: Mesh
    member: Leader | Follower | None
    """This process's side of the cluster. None: it is alone."""


def set_up_devices(options: LaunchOptions, connected: Callable[[Member], None] = lambda member: None) -> Devices:
    """Starts the platform with as many devices as the mesh needs, and the compile cache; as one of several processes, after all
    have joined and connected. Call it before JAX's first use.

    Args:
      options: as `detect` returns them.
      connected: called as soon as this process is connected with the others.

    Raises:
      ConfigError: as `platform.setup`, `join`, `connect`, `make_mesh` and `platform.enable_compile_cache`.
    """
    if not options.is_cluster:
        used = platform.setup(options.platform, options.mesh.devices)
        mesh = make_mesh(options.mesh)
        _enable_compile_cache(options)
        return Devices(used, mesh, None)
    used = platform.choose(options.platform)
    if used == "cpu" and options.local_devices is not None:
        raise ConfigError("local_devices", "names GPUs, and the platform is the CPU. Leave it out.")
    member = connect(join(options))
    connected(member)
    with member.failing_all():
        with member.expect_exit():
            platform.start(used, _local_devices(options.mesh, member.cluster.num_processes))
            mesh = member.cluster.make_mesh(options.mesh)
        if (directory := _enable_compile_cache(options)) is not None:
            write_own_compile_cache(member.cluster, directory)
    return Devices(used, mesh, member)


def _enable_compile_cache(options: LaunchOptions) -> Path | None:
    """The compile cache's directory; None: it is off."""
    if options.compile_cache == "off":
        return None
    auto = options.compile_cache == "auto"
    return platform.enable_compile_cache(platform.default_compile_cache() if auto else options.compile_cache)


def _local_devices(mesh: MeshShape, processes: int) -> int:
    """A process's share of the mesh.

    Raises:
      ConfigError: the processes can't have equal shares.
    """
    if mesh.devices % processes:
        raise ConfigError(
            "mesh",
            f"{mesh} is {mesh.devices} devices, which {processes} processes can't share equally. Use another mesh.",
        )
    return mesh.devices // processes
