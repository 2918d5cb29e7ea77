"""The devices of a program, and the other processes that share its mesh."""

from __future__ import annotations

import dataclasses
from typing import Literal

from jax.sharding import Mesh

from jax_mla_cp import platform
from jax_mla_cp.config.errors import ConfigError
from jax_mla_cp.distributed.cluster import join
from jax_mla_cp.distributed.compile_cache import write_own_compile_cache
from jax_mla_cp.distributed.connect import Member, connect
from jax_mla_cp.launch.options import LaunchOptions
from jax_mla_cp.mesh import MeshShape, make_mesh


@dataclasses.dataclass(frozen=True)
class Devices:
    """The started platform, and the processes that share the mesh."""

    platform: Literal["cpu", "cuda"]
    mesh: Mesh
    member: Member | None
    """This process's side of the cluster. None: it is alone."""


def set_up_devices(options: LaunchOptions) -> Devices:
    """Starts the platform with as many devices as the mesh needs, and the compile cache; as one of several processes, after all
    have joined and connected. Call it before JAX's first use.

    Raises:
      ConfigError: as `platform.setup`, `join`, `connect`, `make_mesh` and `platform.enable_compile_cache`.
    """
    if not options.is_cluster:
        used = platform.setup(options.platform, options.mesh.devices)
        member, mesh = None, make_mesh(options.mesh)
    else:
        used = platform.choose(options.platform)
        member = connect(join(options))
        with member.expect_exit():
            platform.start(used, _local_devices(options.mesh, member.cluster.num_processes))
            mesh = member.cluster.make_mesh(options.mesh)
    if options.compile_cache != "off":
        auto = options.compile_cache == "auto"
        directory = platform.enable_compile_cache(platform.default_compile_cache() if auto else options.compile_cache)
        if member is not None:
            write_own_compile_cache(member.cluster, directory)
    return Devices(used, mesh, member)


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
