"""Places of the devices of several hosts in a mesh: tp stays inside a host, or the mesh is refused with one that works."""

from __future__ import annotations

import dataclasses
import itertools
import logging
import re
from typing import Any

import jax
import numpy as np
import pytest
from hypothesis import assume, event, given
from hypothesis import strategies as st
from jax.sharding import Mesh

from jax_mla_cp.config.errors import ConfigError
from jax_mla_cp.distributed.cluster import Cluster
from jax_mla_cp.distributed.placement import ProcessDevices, arrange, describe
from jax_mla_cp.launch.devices import _local_devices
from jax_mla_cp.mesh import AXES, MeshShape
from tests.helpers import fake_cluster


@dataclasses.dataclass(frozen=True)
class Device:
    """The part of a device that placement looks at."""

    id: int
    process_index: int
    host: str
    device_kind: str = "NVIDIA H200"
    platform: str = "gpu"


HOSTS = ("host-a", "host-b", "host-a", "host-b")


def processes_on(hosts: list[str], devices: int) -> list[ProcessDevices]:
    """One process for each entry of `hosts`, with so many devices."""
    return [
        ProcessDevices(host, host, [Device(i * devices + j, i, host) for j in range(devices)])  # type: ignore[misc]
        for i, host in enumerate(hosts)
    ]


def divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]


@st.composite
def layouts(draw: st.DrawFn) -> tuple[list[ProcessDevices], MeshShape]:
    """Hosts with different numbers of processes, numbered in any order, and a mesh of all their devices."""
    counts = draw(st.lists(st.integers(1, 4), min_size=1, max_size=4))
    hosts = draw(st.permutations([f"h{i}" for i, count in enumerate(counts) for _ in range(count)]))
    processes = processes_on(hosts, draw(st.sampled_from([1, 2, 3, 4, 8])))
    total = sum(len(process.devices) for process in processes)
    tp = draw(st.sampled_from(divisors(total)))
    cp = draw(st.sampled_from(divisors(total // tp)))
    return processes, MeshShape(dp=total // tp // cp, cp=cp, tp=tp)


def placed(shape: MeshShape, devices: list[Any]) -> np.ndarray:
    """[dp, cp, tp], as `make_mesh` lays them out."""
    return np.array(devices, object).reshape(shape.dp, shape.cp, shape.tp)


def crossing(shape: MeshShape, devices: list[Any]) -> int:
    """tp groups with devices of more than one host."""
    return sum(len({d.host for d in group}) > 1 for group in placed(shape, devices).reshape(-1, shape.tp))


def per_host(processes: list[ProcessDevices]) -> dict[str, int]:
    counts: dict[str, int] = {}
    for process in processes:
        counts[process.host] = counts.get(process.host, 0) + len(process.devices)
    return counts


@given(layouts())
def test_tp_stays_inside_a_host_or_is_refused(layout: tuple[list[ProcessDevices], MeshShape]) -> None:
    processes, shape = layout
    everything = {device for process in processes for device in process.devices}
    counts = per_host(processes)
    fits = len(counts) == 1 or all(count % shape.tp == 0 for count in counts.values())
    event(f"fits: {fits}")
    if fits:
        ordered = arrange(shape, processes)
        assert len(ordered) == len(everything) and set(ordered) == everything
        assert crossing(shape, ordered) == 0
        return
    with pytest.raises(ConfigError) as refused:
        arrange(shape, processes)
    found = re.search(r"Use mesh='(.+?)'", refused.value.message)
    assert refused.value.field == "mesh" and found, refused.value.message
    instead = MeshShape.parse(found[1])
    assert (instead.devices, instead.dp) == (shape.devices, shape.dp) and instead.tp < shape.tp
    assert crossing(instead, arrange(instead, processes)) == 0, "what it says to use works"


@given(layouts())
def test_tp_may_cross_hosts_if_allowed(layout: tuple[list[ProcessDevices], MeshShape]) -> None:
    processes, shape = layout
    ordered = arrange(shape, processes, allow_tp_across_hosts=True)
    assert set(ordered) == {device for process in processes for device in process.devices}
    hosts = [device.host for device in ordered]  # type: ignore[attr-defined]
    assert len(list(itertools.groupby(hosts))) == len(set(hosts)), "no host's devices are torn apart"


def test_in_the_order_of_processes_tp_would_cross() -> None:
    """Negative control: with processes interleaved over hosts, JAX's own order breaks what `arrange` holds."""
    processes = processes_on(["a", "b", "a", "b"], 2)
    own = [device for process in processes for device in process.devices]
    assert crossing(MeshShape(tp=4, cp=2), own) > 0
    assert crossing(MeshShape(tp=4, cp=2), arrange(MeshShape(tp=4, cp=2), processes)) == 0


def test_what_is_said_of_four_machines_of_eight() -> None:
    processes = processes_on(["n0", "n1", "n2", "n3"], 8)
    shape = MeshShape(tp=8, cp=4)
    mesh = Mesh(placed(shape, arrange(shape, processes)), AXES)
    assert describe(mesh, processes) == [f"process {i} on n{i}: 8 x NVIDIA H200  cp={i} tp=0-7" for i in range(4)]
    with pytest.raises(ConfigError) as refused:
        arrange(MeshShape(tp=16, cp=2), processes)
    assert str(refused.value) == (
        "mesh: tp=16 does not divide the 8 devices of n0, so that a tp group would cross hosts, and every layer's all-reduce the "
        "network. Use mesh='tp=8,cp=4', or allow_tp_across_hosts=True."
    )


@pytest.fixture
def eight(monkeypatch: pytest.MonkeyPatch) -> Cluster:
    """The second of four processes on two hosts, with two devices each."""
    devices = [Device(i, i // 2, "", "cpu", "cpu") for i in range(8)]
    monkeypatch.setattr(jax, "devices", lambda: devices)
    return dataclasses.replace(fake_cluster.cluster(fake_cluster.Coordination(4), 1, 4), hosts=HOSTS, machines=HOSTS)


def test_a_cluster_makes_its_mesh(eight: Cluster, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        mesh = eight.make_mesh(MeshShape(tp=4, cp=2))
        dataclasses.replace(eight, process_id=0).make_mesh(MeshShape(tp=4, cp=2))
    assert [[d.process_index for d in group] for group in mesh.devices[0]] == [[0, 0, 2, 2], [1, 1, 3, 3]]
    lines = [
        "process 0 on host-a: 2 x cpu  cp=0 tp=0-1",
        "process 1 on host-b: 2 x cpu  cp=1 tp=0-1",
        "process 2 on host-a: 2 x cpu  cp=0 tp=2-3",
        "process 3 on host-b: 2 x cpu  cp=1 tp=2-3",
    ]
    mine, leaders, whole = (record.getMessage() for record in caplog.records)
    assert (mine, leaders) == (f"this is {lines[1]}", f"this is {lines[0]}")
    assert whole.splitlines() == ["mesh tp=4,cp=2 over 4 processes:", *(f"  {line}" for line in lines)]


def test_a_cluster_refuses_other_numbers_of_devices(eight: Cluster) -> None:
    with pytest.raises(ConfigError, match="need 16 devices, found 8"):
        eight.make_mesh(MeshShape(tp=4, cp=4))
    with pytest.raises(ConfigError, match=r"mesh: tp=8 does not divide the 4 devices of host-a.*Use mesh='tp=4,cp=2'"):
        eight.make_mesh(MeshShape(tp=8))
    allowed = dataclasses.replace(eight.options, allow_tp_across_hosts=True)
    assert dataclasses.replace(eight, options=allowed).make_mesh(MeshShape(tp=8)).shape["tp"] == 8


def test_processes_share_a_mesh_equally_or_not_at_all() -> None:
    assert _local_devices(MeshShape(tp=8, cp=4), 4) == 8
    with pytest.raises(ConfigError, match=r"mesh: tp=2,cp=2 is 4 devices, which 3 processes can't share equally"):
        _local_devices(MeshShape(tp=2, cp=2), 3)


@given(layouts())
def test_every_process_is_described(layout: tuple[list[ProcessDevices], MeshShape]) -> None:
    processes, shape = layout
    assume(shape.devices > 1)
    mesh = Mesh(placed(shape, arrange(shape, processes, allow_tp_across_hosts=True)), AXES)
    lines = describe(mesh, processes)
    for i, (line, process) in enumerate(zip(lines, processes, strict=True)):
        assert line.startswith(f"process {i} on {process.host}: {len(process.devices)} x NVIDIA H200")
        assert all((f" {axis}=" in line) == (mesh.shape[axis] > 1) for axis in AXES)
