"""The processes that run a benchmark's rows together."""

from __future__ import annotations

import contextlib
import dataclasses

from jax.sharding import Mesh

from jax_mla_cp.distributed.member import Member
from jax_mla_cp.mesh import MeshShape, make_mesh


class ProcessFailed(Exception):
    """This process can't go on, and the others can't without it."""


@dataclasses.dataclass(frozen=True)
class Processes:
    """This process alone, or those of a cluster."""

    member: Member | None = None

    @property
    def alone(self) -> bool:
        return self.member is None

    def make_mesh(self, shape: MeshShape) -> Mesh:
        """Makes a mesh of this process's devices, or of all processes'.

        Raises:
          ConfigError: as `jax_mla_cp.mesh.make_mesh` and `Cluster.make_mesh`.
        """
        return make_mesh(shape) if self.member is None else self.member.cluster.make_mesh(shape)

    def slowest(self, seconds: float) -> float:
        """The longest of all processes' times. Every process must call it."""
        if self.member is None:
            return seconds
        return max(map(float, self.member.cluster.store.exchange("time", repr(seconds))))

    def expect_exit(self) -> contextlib.AbstractContextManager[None]:
        """A block in which all processes may end for a reason that each of them finds itself. If it raises, they do."""
        return contextlib.nullcontext() if self.member is None else self.member.expect_exit()
