"""`ClusterOptions`: the processes that share a mesh, and how this one finds the others."""

from __future__ import annotations

import dataclasses
import math
import re
from pathlib import Path

from jax_mla_cp.config.errors import ConfigError, check_whole

_ADDRESS = re.compile(r"(?P<host>\[[0-9A-Fa-f:.]+\]|[^\s:\[\]]+):(?P<port>\d{1,5})")


@dataclasses.dataclass(frozen=True)
class ClusterOptions:
    """Options of a program that runs as several processes. A field is the flag of the same name.

    Raises:
      ConfigError: options that exclude each other, or values out of bounds.
    """

    coordinator: str | None = None
    """HOST:PORT of process 0, where the processes find each other. None: this process is alone, or `distributed`."""
    num_processes: int | None = None
    process_id: int | None = None
    distributed: bool = False
    """Coordinator, number of processes and process id are those that JAX detects: Slurm, Open MPI, Kubernetes."""
    local_devices: tuple[int, ...] | None = None
    """The GPUs of this host that this process uses. None: all."""
    cluster_key_file: Path | None = None
    """File whose first line authenticates the processes to each other. None: the environment's `JAX_MLA_CP_CLUSTER_KEY`, or a
    key that process 0 makes and passes through JAX's coordination service."""
    heartbeat_timeout: float = 10.0
    """Seconds of silence after which a process counts as lost."""
    allow_tp_across_hosts: bool = False

    def __post_init__(self) -> None:
        manual = {"coordinator": self.coordinator, "num_processes": self.num_processes, "process_id": self.process_id}
        given = [name for name, value in manual.items() if value is not None]
        if self.distributed and given:
            raise ConfigError(given[0], "excludes `distributed`, which detects it. Leave one of them out.")
        if given and len(given) < len(manual):
            missing = next(name for name in manual if name not in given)
            raise ConfigError(
                missing,
                f"is missing beside `{given[0]}`. Several processes need `coordinator`, `num_processes` and `process_id`, or "
                "`distributed` alone.",
            )
        if self.coordinator is not None:
            split_address(self.coordinator)
            check_whole("num_processes", self.num_processes, 1, 65536)
            assert self.num_processes is not None
            check_whole("process_id", self.process_id, 0, self.num_processes - 1)
        if not self.is_cluster:
            for name in ("local_devices", "cluster_key_file"):
                if getattr(self, name) is not None:
                    raise ConfigError(name, "needs several processes. Add `coordinator`, or `distributed`.")
        if self.local_devices is not None:
            if not self.local_devices or len(set(self.local_devices)) < len(self.local_devices):
                raise ConfigError("local_devices", f"must be different device numbers, got {self.local_devices}.")
            for device in self.local_devices:
                check_whole("local_devices", device, 0, 1023)
        timeout = self.heartbeat_timeout
        if not (math.isfinite(timeout) and 1 <= timeout <= 3600):
            raise ConfigError("heartbeat_timeout", f"must be seconds from 1 to 3600, got {timeout:g}.")

    @property
    def is_cluster(self) -> bool:
        return self.distributed or self.coordinator is not None


def split_address(address: str) -> tuple[str, int]:
    """Host and port of the coordinator; an IPv6 host without its brackets.

    Raises:
      ConfigError: it is no HOST:PORT.
    """
    match = _ADDRESS.fullmatch(address)
    if match is None or not 1 <= int(match["port"]) <= 65535:
        raise ConfigError(
            "coordinator", f"must be HOST:PORT of process 0, such as 10.0.0.1:8476 or [fd00::1]:8476, got {address!r}."
        )
    return match["host"].strip("[]"), int(match["port"])
