"""The benchmarks' command line: examples that can be typed, defaults as --help tells them, errors in a line."""

from __future__ import annotations

import argparse
import re
import shlex
from pathlib import Path

import pytest

from jax_mla_cp.bench import bench_flags
from jax_mla_cp.bench.bench_flags import parse
from jax_mla_cp.distributed.cluster_options import ClusterOptions
from jax_mla_cp.mesh import MeshShape

EXAMPLES = [
    (name, line.split("jax_mla_cp.bench ")[1])
    for name, text in bench_flags._EPILOG.items()
    for line in text.splitlines()
    if line.startswith("  python -m jax_mla_cp.bench ")
]


def help_of(command: str) -> str:
    found = next(a.choices for a in bench_flags.make_parser()._actions if isinstance(a, argparse._SubParsersAction))
    return " ".join(found[command].format_help().split())


def test_every_command_has_examples() -> None:
    assert {command for command, _ in EXAMPLES} == set(bench_flags._COMMANDS)


@pytest.mark.parametrize(("command", "line"), EXAMPLES)
def test_examples_can_be_typed(command: str, line: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    words = shlex.split(line.replace("/mnt/nvme", str(tmp_path)), comments=True)
    assert parse(words).command == command


@pytest.mark.parametrize(
    ("command", "told"),
    [
        ("attention", "--samples N samples per row (default: 10)"),
        ("load", "--samples N samples per row (default: 3)"),
        ("host", "cpu: smoke test with small sizes (default: cpu)"),
        ("scaling", "tiny (default: deepseek_v2_lite)"),
        ("scaling", "(default: tp=1,cp=1 tp=1,cp=2 tp=2,cp=1)"),
        ("scaling", "expanded,absorbed (default: expanded)"),
        ("model", "(default: 256K,512K,1M)"),
        ("host", "only receive and echo the steps (default: 1)"),
        ("scaling", "--coordinator HOST:PORT address of process 0"),
        ("decode", "context length, e.g. 64x8K,8x128K (default: 64x8K,8x128K,256x2K,16x32K,1x128K)"),
    ],
)
def test_help_tells_the_commands_own_defaults(command: str, told: str) -> None:
    assert told in help_of(command)


def test_a_list_of_meshes_goes_back_in() -> None:
    told = re.search(r"each compared with the first \(default: ([^)]*)\)", help_of("scaling"))
    assert told
    assert parse(["scaling", "--meshes", *told[1].split()]) == parse(["scaling"])
    assert parse(["scaling"]).meshes == (MeshShape(), MeshShape(cp=2), MeshShape(tp=2))


def test_flags_of_several_processes() -> None:
    line = (
        "scaling --coordinator 10.0.0.1:8476 --num-processes 4 --process-id 3 --local-devices 0,1 --heartbeat-timeout 5"
    )
    options = parse(line.split())
    cluster = ClusterOptions("10.0.0.1:8476", 4, 3, local_devices=(0, 1), heartbeat_timeout=5)
    assert options.cluster == cluster and options.cluster.is_cluster
    assert not parse(["scaling"]).cluster.is_cluster
    assert parse(["host", "--processes", "3"]).processes == 3


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("decode --mesh tp=4", "--mesh: is for the whole decode step. Add --full"),
        ("decode --ep-axes tp --layers 2", "--ep-axes: is for the whole decode step. Add --full"),
        ("decode --layers 2", "--layers: is for the whole decode step. Add --full"),
        ("load --model tiny", "--model: no such flag"),
        ("attention --platform cpu --seq 128K", "--platform: cpu is there to try the program, and 131072 tokens"),
        ("attention --platform cpu --seq 128K", "Give small sizes: --seq 256 --heads 2."),
        ("layer --platform cpu", "Give small sizes: --model tiny --seq 1024."),
        ("decode --platform cpu", "Give small sizes: --heads 2, and --shapes like 4x128."),
        ("load --attention xla", "--attention: no such flag"),
        ("host --dtype float32", "--dtype: no such flag"),
        ("host --processes 0", "--processes: must be whole numbers from 1 to 64, got 0"),
        ("host --coordinator a:1", "--coordinator: no such flag"),
        ("scaling --processes 2", "--processes: no such flag"),
        ("scaling --coordinator a:1", "--num-processes: is missing beside --coordinator"),
        ("scaling --coordinator a --num-processes 2 --process-id 0", "--coordinator: must be HOST:PORT"),
        ("scaling --distributed --process-id 1", "--process-id: excludes --distributed"),
        ("scaling --local-devices 0", "--local-devices: needs several processes"),
        ("attention ''", "'': no such flag"),
        ("attention --seq none", "must be whole numbers"),
        ("attention --json /", "--json: / is not a file"),
        ("attention --json /dev/null", "--json: /dev/null is not a file"),
        ("attention --json /no/such/a.json", "the directory /no/such does not exist"),
    ],
)
def test_settings_that_cant_work(line: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        parse(shlex.split(line))
    error = capsys.readouterr().err
    assert ended.value.code == 2 and message in error and error.count("\n") == 1
