"""`python -m jax_mla_cp.eval` as two processes, one device each."""

from __future__ import annotations

import json
import socket
from pathlib import Path

import pytest

from tests.helpers.processes import started

FLAGS = (
    *("--platform", "cpu", "--mesh", "cp=2", "--lengths", "300", "--depths", "2", "--perplexity-tokens", "0"),
    *("--page-size", "64", "--prefill-chunk", "512", "--num-processes", "2"),
)


@pytest.mark.slow
def test_two_processes_find_the_passkeys(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        flags = (*FLAGS, "--coordinator", f"127.0.0.1:{probe.getsockname()[1]}")
    out = tmp_path / "out.json"
    with (
        started("jax_mla_cp.eval", *flags, "--process-id", "0", "--json", str(out)) as leader,
        started("jax_mla_cp.eval", *flags, "--process-id", "1") as follower,
    ):
        _, errors = leader.communicate(timeout=300)
        assert leader.returncode == 0, errors
        assert follower.wait(60) == 0, follower.communicate()[1]
    report = json.loads(out.read_text())
    assert report["mesh"] == "tp=1,cp=2" and len(report["rows"]) == 2
    assert report["passkey_accuracy"] == 1
