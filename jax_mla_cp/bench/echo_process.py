"""`python -m jax_mla_cp.bench.echo_process ID PROCESSES FLAGS`: a follower of `bench host` (bench/followers.py).

It receives, decodes and echoes every step as a follower of the server does, but has no model and starts no device.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from jax.sharding import AbstractMesh

from jax_mla_cp.batch.shapes import StepShape
from jax_mla_cp.bench.bench_flags import parse
from jax_mla_cp.bench.followers import READY, loopback_cluster
from jax_mla_cp.bench.host_step import make_planner
from jax_mla_cp.bench.send import PROGRAM
from jax_mla_cp.config.presets import model_config
from jax_mla_cp.distributed.follower import Follower
from jax_mla_cp.distributed.handshake import KEY_VARIABLE
from jax_mla_cp.mesh import AXES
from jax_mla_cp.step.inputs import StepInputs
from jax_mla_cp.step.planner import Planner
from jax_mla_cp.step.sampling import SamplerOutput


class NullRunner:
    """Stands in for a `Runner`, of which it has what a follower uses."""

    def __init__(self, planner: Planner):
        self.planner = planner

    def fingerprint(self, shape: StepShape) -> str:
        return PROGRAM

    def execute(self, inputs: StepInputs) -> SamplerOutput:
        """Returns no results, and the page table's checksums as they should be."""
        return SamplerOutput(None, None, None, None, table_checksum=inputs.table_checksum)


class _StandardInput:
    """Stands in for the client of JAX's coordination service. The only value that is asked for is the leader's port."""

    def blocking_key_value_get(self, name: str, timeout_ms: int) -> str:
        return sys.stdin.readline().strip()


def main(argv: Sequence[str]) -> None:
    """Follows until process 0 ends this process."""
    process_id, processes, *flags = argv
    options = parse(["host", *flags])
    mesh = AbstractMesh(tuple(getattr(options.mesh, axis) for axis in AXES), AXES)
    planner = make_planner(options, model_config(options.model), mesh)
    print(READY, flush=True)
    cluster = loopback_cluster(int(process_id), int(processes), _StandardInput())
    follower = Follower(cluster, os.environ[KEY_VARIABLE].encode())
    follower.run(NullRunner(planner))


if __name__ == "__main__":
    main(sys.argv[1:])
