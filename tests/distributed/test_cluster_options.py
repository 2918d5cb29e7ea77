"""The options of several processes: what can't work, told in parameters and in flags; and what JAX detects."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from jax_mla_cp.config.errors import ConfigError
from jax_mla_cp.distributed.cluster import detect
from jax_mla_cp.distributed.cluster_options import ClusterOptions, split_address
from jax_mla_cp.eval import eval_options
from jax_mla_cp.serve import server_options

AT: dict[str, Any] = {"coordinator": "10.0.0.1:8476", "num_processes": 4, "process_id": 1}
FLAGS = "--coordinator 10.0.0.1:8476 --num-processes 4 --process-id 1"

BAD: list[tuple[dict[str, Any], str]] = [
    ({"distributed": True, "process_id": 1}, "process_id: excludes `distributed`, which detects it. Leave one of them"),
    (AT | {"distributed": True}, "coordinator: excludes `distributed`"),
    ({"coordinator": "a:1"}, "num_processes: is missing beside `coordinator`. Several processes need `coordinator`, "),
    ({"process_id": 0}, "coordinator: is missing beside `process_id`."),
    ({"coordinator": "a:1", "num_processes": 2}, "process_id: is missing beside `coordinator`."),
    (
        AT | {"coordinator": "10.0.0.1"},
        "coordinator: must be HOST:PORT of process 0, such as 10.0.0.1:8476 or [fd00::1]",
    ),
    (AT | {"coordinator": "fd00::1:8476"}, "coordinator: must be HOST:PORT of process 0"),
    (AT | {"coordinator": "host:0"}, "coordinator: must be HOST:PORT of process 0"),
    (AT | {"coordinator": "host:70000"}, "coordinator: must be HOST:PORT of process 0"),
    (AT | {"num_processes": 0}, "num_processes: must be a whole number from 1 to 65536, got 0"),
    (AT | {"process_id": 4}, "process_id: must be a whole number from 0 to 3, got 4"),
    (AT | {"process_id": -1}, "process_id: must be a whole number from 0 to 3, got -1"),
    ({"local_devices": (0,)}, "local_devices: needs several processes. Add `coordinator`, or `distributed`."),
    ({"cluster_key_file": Path("key")}, "cluster_key_file: needs several processes. Add `coordinator`"),
    (AT | {"local_devices": (0, 0)}, "local_devices: must be different device numbers, got (0, 0)."),
    (AT | {"local_devices": ()}, "local_devices: must be different device numbers, got ()."),
    (AT | {"local_devices": (-1,)}, "local_devices: must be a whole number from 0 to 1023, got -1"),
    ({"heartbeat_timeout": 0.5}, "heartbeat_timeout: must be seconds from 1 to 3600, got 0.5."),
    ({"heartbeat_timeout": float("nan")}, "heartbeat_timeout: must be seconds from 1 to 3600, got nan."),
]


@pytest.mark.parametrize(("options", "message"), BAD)
def test_options_that_cant_work(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as refused:
        ClusterOptions(**options)
    assert str(refused.value).startswith(message)


BAD_FLAGS = [
    ("--distributed --num-processes 2", "--num-processes: excludes --distributed, which detects it."),
    (
        "--coordinator a:1",
        "--num-processes: is missing beside --coordinator. Several processes need --coordinator, "
        "--num-processes and --process-id, or --distributed alone.",
    ),
    ("--coordinator a --num-processes 2 --process-id 0", "--coordinator: must be HOST:PORT of process 0"),
    (f"{FLAGS} --num-processes 1", "--process-id: must be a whole number from 0 to 0, got 1"),
    (f"{FLAGS} --process-id one", "--process-id: must be a whole number, got 'one'"),
    ("--local-devices 0,1", "--local-devices: needs several processes. Add --coordinator, or --distributed."),
    (f"{FLAGS} --local-devices 0,x", "--local-devices: must be a whole number, got 'x'"),
    ("--cluster-key-file key", "--cluster-key-file: needs several processes. Add --coordinator"),
    ("--heartbeat-timeout 0", "--heartbeat-timeout: must be seconds from 1 to 3600, got 0."),
    ("--cordinator a:1", "--cordinator: no such flag. Did you mean --coordinator?"),
]


@pytest.mark.parametrize("parse", [server_options.parse, eval_options.parse], ids=["serve", "eval"])
@pytest.mark.parametrize(("flags", "message"), BAD_FLAGS)
def test_flags_that_cant_work(
    parse: Callable[[Sequence[str]], object], flags: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        parse(flags.split())
    assert ended.value.code == 2
    told = capsys.readouterr().err
    assert told.startswith(f"error: {message}") and told.count("\n") == 1


def test_all_flags() -> None:
    flags = f"{FLAGS} --local-devices 2,3 --cluster-key-file key --heartbeat-timeout 2.5 --allow-tp-across-hosts"
    read = [server_options.parse(flags.split()), eval_options.parse(flags.split()).launch]
    for options in read:
        assert options.is_cluster and not options.distributed and options.allow_tp_across_hosts
        assert (options.coordinator, options.num_processes, options.process_id) == ("10.0.0.1:8476", 4, 1)
        assert (options.local_devices, options.cluster_key_file) == ((2, 3), Path("key"))
        assert options.heartbeat_timeout == 2.5
    assert server_options.parse(["--distributed"]).is_cluster
    assert not server_options.parse([]).is_cluster


def test_the_watchdog_is_shorter_with_several_processes() -> None:
    assert server_options.parse([]).watchdog_seconds == 600
    assert server_options.parse(FLAGS.split()).watchdog_seconds == 60
    assert server_options.parse([*FLAGS.split(), "--watchdog", "5"]).watchdog_seconds == 5
    assert server_options.parse([*FLAGS.split(), "--watchdog", "off"]).watchdog_seconds is None


@pytest.mark.parametrize(
    ("address", "host", "port"),
    [("10.0.0.1:8476", "10.0.0.1", 8476), ("node-3.local:1", "node-3.local", 1), ("[fd00::1]:65535", "fd00::1", 65535)],
)
def test_addresses(address: str, host: str, port: int) -> None:
    assert split_address(address) == (host, port)


SLURM = {
    "SLURM_JOB_ID": "4097",
    "SLURM_STEP_NODELIST": "node[07-10]",
    "SLURM_NTASKS": "4",
    "SLURM_PROCID": "2",
    "SLURM_LOCALID": "0",
}
OTHERS = (
    "OMPI_MCA_orte_hnp_uri",
    "OMPI_COMM_WORLD_SIZE",
    "OMPI_COMM_WORLD_RANK",
    "KUBERNETES_SERVICE_HOST",
    "JAX_COORDINATOR_PORT",
)


@pytest.fixture
def no_cluster(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for name in (*SLURM, *OTHERS):
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


def test_slurm_is_detected(no_cluster: pytest.MonkeyPatch) -> None:
    for name, value in SLURM.items():
        no_cluster.setenv(name, value)
    found = detect(server_options.ServerOptions(distributed=True, local_devices=(0, 1), page_size=32))
    assert (found.num_processes, found.process_id) == (4, 2)
    assert found.coordinator == "node07:61441"  # 61440 and up, by the job's number
    assert found.is_cluster and not found.distributed
    assert (found.local_devices, found.page_size) == ((0, 1), 32), "the rest is as it was"


def test_nothing_is_detected_unless_asked(no_cluster: pytest.MonkeyPatch) -> None:
    for name, value in SLURM.items():
        no_cluster.setenv(name, value)
    options = ClusterOptions()
    assert detect(options) is options


def test_without_a_cluster_it_says_what_it_looked_for(no_cluster: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError) as refused:
        detect(ClusterOptions(distributed=True))
    assert str(refused.value) == (
        "distributed: JAX detects no cluster here. Slurm: no SLURM_JOB_ID; Open MPI: no OMPI_MCA_orte_hnp_uri; "
        "Kubernetes: no KUBERNETES_SERVICE_HOST. Start it with srun, mpirun or as a Kubernetes Job, or give "
        "`coordinator`, `num_processes` and `process_id`."
    )


def test_half_a_cluster_is_told_by_its_variables(no_cluster: pytest.MonkeyPatch) -> None:
    """A login shell of Slurm: in a job, but not started by srun."""
    no_cluster.setenv("SLURM_JOB_ID", "4097")
    with pytest.raises(ConfigError) as refused:
        detect(ClusterOptions(distributed=True))
    assert (
        "Slurm: found SLURM_JOB_ID; SLURM_STEP_NODELIST, SLURM_NTASKS, SLURM_PROCID, SLURM_LOCALID is missing"
        in str(refused.value)
    )


def test_a_broken_environment_is_told(no_cluster: pytest.MonkeyPatch) -> None:
    for name, value in (SLURM | {"SLURM_NTASKS": "four"}).items():
        no_cluster.setenv(name, value)
    with pytest.raises(ConfigError, match=r"distributed: JAX's cluster detection failed: .*four"):
        detect(ClusterOptions(distributed=True))
