"""Joins the processes of a cluster: detection, JAX's distributed runtime, and which host each process is on."""

from __future__ import annotations

import contextlib
import dataclasses
import ipaddress
import json
import logging
import os
import socket
import time
from pathlib import Path
from typing import TypeVar

import jax
from jax.sharding import Mesh

from jax_mla_cp.config.errors import ConfigError
from jax_mla_cp.distributed.cluster_options import ClusterOptions, split_address
from jax_mla_cp.distributed.exit import Unreachable
from jax_mla_cp.distributed.placement import ProcessDevices, arrange, describe
from jax_mla_cp.distributed.store import JOINING, Store
from jax_mla_cp.mesh import MeshShape, make_mesh
from jax_mla_cp.platform import add_xla_flags

log = logging.getLogger(__name__)

Options = TypeVar("Options", bound=ClusterOptions)

_JOIN_SECONDS = 300
_ENVIRONMENTS = {
    "Slurm": ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID"),
    "Open MPI": ("OMPI_MCA_orte_hnp_uri", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"),
    "Kubernetes": ("KUBERNETES_SERVICE_HOST",),
}
"""Variables that JAX's cluster detection reads (jax/_src/clusters)."""


@dataclasses.dataclass(frozen=True)
class Cluster:
    """The processes that share a mesh, after all have joined."""

    options: ClusterOptions
    process_id: int
    num_processes: int
    coordinator_host: str
    hosts: tuple[str, ...]
    """Host name of each process."""
    machines: tuple[str, ...]
    """Identifies each process's machine, which containers may not do by their host names."""
    store: Store

    @property
    def leads(self) -> bool:
        """Process 0 plans the steps; the others follow."""
        return self.process_id == 0

    def name(self, process: int) -> str:
        """A process in messages."""
        return f"process {process} ({self.hosts[process]})"

    def smallest_budget(self, value: int) -> int:
        """The smallest of all processes' memory budgets. Every process must call it."""
        return min(map(int, self.store.exchange("memory budget", str(value))))

    def wait_for_all(self, stage: str) -> None:
        """Returns when all processes have called it."""
        self.store.exchange(stage, "")

    def make_mesh(self, shape: MeshShape) -> Mesh:
        """The mesh over all processes' devices, tp inside of a host; logs where this process stands, and on process 0 the whole map.

        Raises:
          ConfigError: too few or too many devices, or tp would cross hosts without `allow_tp_across_hosts`.
        """
        devices = jax.devices()
        if len(devices) != shape.devices:
            make_mesh(shape, devices)  # says so
        processes = [
            ProcessDevices(self.hosts[i], self.machines[i], [d for d in devices if d.process_index == i])
            for i in range(self.num_processes)
        ]
        ordered = arrange(shape, processes, allow_tp_across_hosts=self.options.allow_tp_across_hosts)
        mesh = make_mesh(shape, ordered)
        lines = describe(mesh, processes)
        log.info("this is %s", lines[self.process_id])
        if self.leads:
            log.info("mesh %s over %d processes:\n  %s", shape, self.num_processes, "\n  ".join(lines))
        return mesh


def join(options: ClusterOptions) -> Cluster:
    """Waits until all processes have joined. Call it after `platform.choose` and before JAX starts.

    Args:
      options: as `detect` returns them.

    Raises:
      ConfigError: the coordinator can't be reached, or a process is missing.
    """
    coordinator, count, number = options.coordinator, options.num_processes, options.process_id
    assert coordinator is not None and count is not None and number is not None
    host, port = split_address(coordinator)
    # A process would wait for peers that have the program in their cache.
    add_xla_flags({"--xla_gpu_shard_autotuning": "false"})
    # JAX would take SIGTERM for itself; here it drains the server.
    jax.config.update("jax_enable_preemption_service", False)
    if number == 0:
        _warn_if_loopback(host)
    log.info("process %d of %d on %s: joining at %s", number, count, socket.gethostname(), coordinator)
    began = time.monotonic()
    bind = os.environ.get("JAX_COORDINATOR_BIND_ADDRESS") or (f"[{host}]:{port}" if ":" in host else f"{host}:{port}")
    # Empty means all; with None, JAX's detection would give each task one.
    local_devices = list(options.local_devices or ())
    try:
        jax.distributed.initialize(
            coordinator,
            count,
            number,
            local_device_ids=local_devices,
            cluster_detection_method="deactivate",
            initialization_timeout=_JOIN_SECONDS,
            coordinator_bind_address=bind,
        )
    except Exception as error:  # jaxlib's own classes, and RuntimeError
        raise Unreachable(
            "coordinator",
            f"process {number} could not join {count} processes at {coordinator}: {str(error).splitlines()[0]}. Start the same command on "
            "every host within 5 minutes, with process ids 0 to one less than `num_processes`; process 0 runs on the coordinator's "
            "host, and its port must be free there and open to the others.",
        ) from error
    from jax._src import distributed

    store = Store(distributed.global_state.client, number, count)
    names = store.exchange("host", json.dumps([socket.gethostname(), _machine()]), JOINING)
    hosts, machines = zip(*map(json.loads, names), strict=True)
    log.info("all %d processes have joined (%.1f s)", count, time.monotonic() - began)
    return Cluster(options, number, count, host, hosts, machines, store)


def _warn_if_loopback(host: str) -> None:
    """Warns of a name that this host takes for itself alone, as Debian's 127.0.1.1 for a host's own name."""
    with contextlib.suppress(OSError, ValueError):
        address = str(socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)[0][4][0])
        if ipaddress.ip_address(address).is_loopback and host not in ("localhost", address):
            log.warning(
                "%s is %s on this host, which no other host can reach. If the others don't join, give another name or "
                "address of it as --coordinator.",
                host,
                address,
            )


def detect(options: Options) -> Options:
    """The options with coordinator, number of processes and process id in place of `distributed`.

    Raises:
      ConfigError: JAX detects no cluster; it says what was found of each kind.
    """
    if not options.distributed:
        return options
    from jax._src.clusters import ClusterEnv

    try:
        coordinator, count, number, _ = ClusterEnv.auto_detect_unset_distributed_params(
            None, None, None, list(options.local_devices or ()), None, _JOIN_SECONDS
        )
    except Exception as error:  # of whichever environment it found
        raise ConfigError("distributed", f"JAX's cluster detection failed: {error}") from error
    if coordinator is None or count is None or number is None:
        raise ConfigError("distributed", f"JAX detects no cluster here. {_found()} {_ADVICE}")
    return dataclasses.replace(
        options, distributed=False, coordinator=coordinator, num_processes=count, process_id=number
    )


def _machine() -> str:
    """Tells this machine from others."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    return boot.read_text().strip() if boot.exists() else socket.gethostname()


_ADVICE = "Start it with srun, mpirun or as a Kubernetes Job, or give `coordinator`, `num_processes` and `process_id`."


def _found() -> str:
    """The variables of each environment that are set and that are missing."""
    parts = []
    for name, variables in _ENVIRONMENTS.items():
        found = [v for v in variables if v in os.environ]
        missing = [v for v in variables if v not in os.environ]
        if name == "Kubernetes" and not missing:
            parts.append("Kubernetes: the pod is there, the Python package kubernetes or its Job is missing")
        elif found:
            parts.append(f"{name}: found {', '.join(found)}; {', '.join(missing) or 'nothing'} is missing")
        else:
            parts.append(f"{name}: no {missing[0]}")
    return "; ".join(parts) + "."
