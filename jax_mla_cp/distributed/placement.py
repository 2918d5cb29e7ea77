"""The order of several processes' devices in a mesh: tp inside of a host, cp and dp across hosts."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import Mesh

from jax_mla_cp.config.errors import ConfigError
from jax_mla_cp.mesh import AXES, MeshShape


@dataclasses.dataclass(frozen=True)
class ProcessDevices:
    """A process's part of the mesh."""

    host: str
    machine: str
    """The same for all processes on one machine."""
    devices: Sequence[jax.Device]


def arrange(
    shape: MeshShape, processes: Sequence[ProcessDevices], *, allow_tp_across_hosts: bool = False
) -> list[jax.Device]:
    """The devices host by host, in the order of their processes: tp, the mesh's fastest axis, then crosses hosts only where it
    must.

    Raises:
      ConfigError: tp would cross hosts.
    """
    by_machine: dict[str, list[jax.Device]] = {}
    host = {process.machine: process.host for process in processes}
    for process in processes:
        by_machine.setdefault(process.machine, []).extend(process.devices)
    if not allow_tp_across_hosts:
        for machine, devices in by_machine.items():
            if len(by_machine) > 1 and len(devices) % shape.tp:
                raise ConfigError(
                    "mesh",
                    f"tp={shape.tp} does not divide the {len(devices)} devices of {host[machine]}, so that a tp group would cross hosts, and every "
                    f"layer's all-reduce the network. Use mesh='{_inside(shape, list(map(len, by_machine.values())))}', or "
                    "allow_tp_across_hosts=True.",
                )
    return [device for devices in by_machine.values() for device in devices]


def _inside(shape: MeshShape, per_host: Sequence[int]) -> MeshShape:
    """The same number of devices, with the largest tp that stays inside every host; cp takes what tp gives up."""
    tp = math.gcd(shape.tp, *per_host)
    return dataclasses.replace(shape, tp=tp, cp=shape.cp * shape.tp // tp)


def describe(mesh: Mesh, processes: Sequence[ProcessDevices]) -> list[str]:
    """A line for each process: its host, its devices and their places in the mesh.

    Several devices' places along an axis are given as first-last.
    """
    place = dict(zip(mesh.devices.flat, np.ndindex(mesh.devices.shape), strict=True))
    lines = []
    for number, process in enumerate(processes):
        kind = process.devices[0].device_kind
        spans = []
        for axis, name in enumerate(AXES):
            taken = sorted({place[device][axis] for device in process.devices})
            if mesh.shape[name] > 1:
                spans.append(f"{name}={taken[0]}" if len(taken) == 1 else f"{name}={taken[0]}-{taken[-1]}")
        lines.append(f"process {number} on {process.host}: {len(process.devices)} x {kind}  {' '.join(spans)}".rstrip())
    return lines
