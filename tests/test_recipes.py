"""The recipes of docs/several-hosts: their flags exist, their scripts parse, and the start over ssh does what it says."""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from jax_mla_cp.serve.server_flags import make_parser
from jax_mla_cp.serve.server_options import ServerOptions, parse

DOCS = Path(__file__).parent.parent / "docs"
RECIPES = DOCS / "several-hosts"
OTHERS = {"--dist-init-addr", "--master-addr", "--nnodes", "--node-rank"}
"""Flags of vLLM and SGLang, which the page names."""
SERVER = "-m jax_mla_cp.serve"

SSH = """#!/bin/bash
# Stands for ssh: runs the command here. Options first, then the host.
while [[ $1 == -* ]]; do shift 2; done
shift
exec bash -c "$*"
"""
PYTHON = """#!/bin/bash
# Stands for Python on a host: says how it was called, and ends as the server does.
echo "argv: $*" key="$JAX_MLA_CP_CLUSTER_KEY"
[[ $* == *--seed\\ 1* ]] && exit 2
trap 'echo drained; exit 0' TERM
while true; do sleep 0.05; done
"""


def flags() -> set[str]:
    return {flag for action in make_parser()._actions for flag in action.option_strings}


def commands(text: str) -> Iterator[list[str]]:
    """The server's arguments in each command of a text, whose lines may go on after a backslash."""
    for line in text.replace("\\\n", " ").splitlines():
        if SERVER in line and not line.lstrip().startswith("#"):
            yield shlex.split(line.split(SERVER, 1)[1], comments=True)


def options(arguments: list[str]) -> ServerOptions:
    """The arguments parsed, with a number in place of K and up to a shell's operator."""
    end = next((i for i, word in enumerate(arguments) if word in ("&", "|", "||", "&&", ";")), len(arguments))
    return parse(["0" if word == "K" else word for word in arguments[:end]])


def manifest() -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((RECIPES / "leaderworkerset.yaml").read_text()))


def test_the_commands_of_the_page_parse() -> None:
    text = (DOCS / "several-hosts.md").read_text()
    found = [
        options(arguments) for block in re.findall(r"```\w*\n(.*?)```", text, re.S) for arguments in commands(block)
    ]
    terminals = [o for o in found if o.platform == "cpu" and o.num_processes == 2]
    assert [o.process_id for o in terminals] == [0, 1]
    assert len({(str(o.mesh), o.coordinator) for o in terminals}) == 1
    assert any(o.mesh.devices == 32 and o.num_processes == 4 for o in found)
    assert any(o.distributed for o in found)
    assert any(o.local_devices for o in found)


def test_flags_that_the_page_names_exist() -> None:
    named = set(re.findall(r"`(--[a-z][a-z-]+)", (DOCS / "several-hosts.md").read_text()))
    assert named and named - OTHERS <= flags()


@pytest.mark.parametrize("name", ["serve.slurm", "ssh.sh"])
def test_scripts_parse(name: str) -> None:
    done = subprocess.run(["bash", "-n", RECIPES / name], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_the_slurm_script() -> None:
    (arguments,) = commands((RECIPES / "serve.slurm").read_text())
    parsed = options(arguments)
    assert parsed.distributed and parsed.mesh.devices == 32
    text = (RECIPES / "serve.slurm").read_text()
    assert "#SBATCH --nodes=4\n" in text and "#SBATCH --gpus-per-node=8\n" in text


def test_the_manifest() -> None:
    group, service, policy = manifest()
    assert (group["apiVersion"], group["kind"]) == ("leaderworkerset.x-k8s.io/v1", "LeaderWorkerSet")
    template = group["spec"]["leaderWorkerTemplate"]
    leader, worker = (template[name]["spec"] for name in ("leaderTemplate", "workerTemplate"))
    (first,), (other,) = leader["containers"], worker["containers"]
    probes = {"startupProbe", "readinessProbe", "livenessProbe"}
    assert {k: v for k, v in first.items() if k not in {*probes, "ports"}} == other, "the same command everywhere"
    assert probes <= first.keys()
    assert leader["volumes"] == worker["volumes"]
    values = {"LWS_LEADER_ADDRESS": "10.0.0.1", "LWS_GROUP_SIZE": "4", "LWS_WORKER_INDEX": "3"}
    parsed = parse([re.sub(r"\$\((\w+)\)", lambda match: values[match[1]], word) for word in first["args"]])
    assert (parsed.coordinator, parsed.num_processes, parsed.process_id) == ("10.0.0.1:8476", 4, 3)
    gpus = int(first["resources"]["limits"]["nvidia.com/gpu"])
    assert parsed.mesh.devices == template["size"] * gpus
    for spec in (leader, worker):
        assert spec["terminationGracePeriodSeconds"] >= parsed.drain_timeout + 20
    assert first["ports"][0]["containerPort"] == parsed.port
    name = group["metadata"]["name"]
    assert service["spec"]["selector"]["leaderworkerset.sigs.k8s.io/name"] == name
    assert policy["spec"]["podSelector"]["matchLabels"] == {"leaderworkerset.sigs.k8s.io/name": name}
    assert service["metadata"]["name"] != name, "the set has a headless service of its own name"


@pytest.fixture
def ssh(tmp_path: Path) -> dict[str, str]:
    """An environment where ssh and Python are stand-ins."""
    for name, text in (("ssh", SSH), ("server", PYTHON)):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    return {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHON": str(tmp_path / "server")}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_start_over_ssh_hands_signals_on(ssh: dict[str, str], number: signal.Signals) -> None:
    """Each host gets the same command with its own process id, and SIGTERM when the script gets a signal."""
    script = subprocess.Popen(
        [RECIPES / "ssh.sh", "me@10.0.0.1", "10.0.0.2", "--", "--mesh", "tp=2,cp=2"],
        env=ssh,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    assert script.stdout is not None
    started = [script.stdout.readline() for _ in range(2)]
    time.sleep(0.2)
    os.killpg(script.pid, number) if number is signal.SIGINT else script.send_signal(number)
    rest, _ = script.communicate(timeout=20)
    assert script.returncode == 0
    by_host = dict(line.split(": argv: ") for line in started)
    assert by_host.keys() == {"0 me@10.0.0.1", "1 10.0.0.2"}
    keys = set()
    for i, line in enumerate(by_host[host] for host in sorted(by_host)):
        (arguments,) = commands(line.rsplit(" key=", 1)[0])
        parsed = parse(arguments)
        assert (parsed.coordinator, parsed.num_processes, parsed.process_id) == ("10.0.0.1:8476", 2, i)
        assert str(parsed.mesh) == "tp=2,cp=2"
        keys.add(line.rsplit(" key=", 1)[1])
    (key,) = keys
    assert len(key.strip()) == 64
    assert sorted(line for line in rest.splitlines() if "drained" in line) == [
        "0 me@10.0.0.1: drained",
        "1 10.0.0.2: drained",
    ]


def test_the_start_over_ssh_ends_with_the_servers_exit_code(ssh: dict[str, str]) -> None:
    script = [RECIPES / "ssh.sh", "10.0.0.1", "10.0.0.2", "--", "--seed", "1"]
    done = subprocess.run(script, env=ssh, capture_output=True, text=True, timeout=20)
    assert done.returncode == 2, done.stdout + done.stderr


def test_the_start_over_ssh_says_how_it_is_used(ssh: dict[str, str]) -> None:
    done = subprocess.run([RECIPES / "ssh.sh", "10.0.0.1"], env=ssh, capture_output=True, text=True, timeout=20)
    assert done.returncode == 2 and "usage" in done.stderr
