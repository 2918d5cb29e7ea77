"""A server of two processes, one of which is killed, stopped or told to end: clients are told, and no process is left."""

from __future__ import annotations

import itertools
import signal
import socket
from collections.abc import Callable
from pathlib import Path
from typing import get_args

import pytest

from tests.helpers.cluster_failures import Failure, When, Who, check, failing_cluster, inflict
from tests.helpers.soak_sizes import Sizes

FAILURES = [
    Failure(number, who, when)
    for number, who, when in itertools.product(
        (signal.SIGKILL, signal.SIGSTOP, signal.SIGTERM), get_args(Who), get_args(When)
    )
]
FEW = [
    Failure(signal.SIGKILL, "follower", "in decode"),
    Failure(signal.SIGTERM, "follower", "in decode"),
    Failure(signal.SIGSTOP, "follower", "at rest"),
]
"""The failures of `make test`."""


@pytest.fixture(scope="module")
def coordinator() -> str:
    """The address of all clusters, one after the other: each starts where the last one has just failed."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return f"127.0.0.1:{probe.getsockname()[1]}"


@pytest.mark.slow
@pytest.mark.parametrize("failure", [*FEW, *(failure for failure in FAILURES if failure not in FEW)], ids=str)
def test_a_failure_ends_all(
    failure: Failure, coordinator: str, sizes: Sizes, tmp_path: Path, record: Callable[..., None]
) -> None:
    if not sizes.rounds and failure not in FEW:
        pytest.skip("make soak")
    took = []
    for i in range(max(1, sizes.rounds)):
        with failing_cluster(tmp_path / str(i), coordinator) as (running, url):
            seen = inflict(failure, running, url)
            check(failure, seen, running)
            took.append(seen.seconds)
    record("failures", **{str(failure): f"{len(took)} rounds, {min(took):.1f} to {max(took):.1f} s"})
