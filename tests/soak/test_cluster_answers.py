"""Servers of several processes answer as one process does, in every kind of step. `make test` asks less: tests/distributed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.helpers.answer_sheet import compare, fill, sheets
from tests.helpers.processes import cluster, server, url_of
from tests.helpers.soak_sizes import Sizes

CHUNK, LONGEST, RUNNING = 256, 1000, 8
FLAGS = (
    *("--platform", "cpu", "--page-size", "64", "--kv-pages", "128", "--max-model-len", "1200"),
    *("--prefill-chunk", str(CHUNK), "--max-running", str(RUNNING)),
)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("processes", "mesh", "flags"),
    [
        (2, "tp=4,cp=2", ()),
        (2, "tp=4,cp=2", ("--speculative", "mtp", "--draft-tokens", "2")),
        (4, "tp=8,cp=4", ()),
    ],
    ids=["2 x 4", "2 x 4 with drafts", "4 x 8"],
)
def test_several_processes_answer_as_one(
    processes: int, mesh: str, flags: tuple[str, ...], sizes: Sizes, tmp_path: Path, record: Callable[..., None]
) -> None:
    if not sizes.questions:
        pytest.skip("make soak")
    questions = sheets(sizes.questions, sizes.answer, CHUNK, LONGEST, at_a_time=RUNNING)
    with server(*FLAGS, *flags, "--mesh", mesh) as process:
        want = fill(url_of(process), questions)
    with cluster(tmp_path, processes, *FLAGS, *flags, "--mesh", mesh, "--heartbeat-timeout", "120") as running:
        got = fill(running.wait_until_ready(), questions)
        running.stop()
    found = {name: compare(want[name], got[name]) for name in want}
    record(
        f"{processes} processes, {mesh} {' '.join(flags)}".strip(),
        questions=sum(map(len, want.values())),
        ties=sum(each.ties for each in found.values()),
        furthest=max(each.furthest for each in found.values()),
    )
    assert {name: each.wrong for name, each in found.items() if each.wrong} == {}
    assert all(each.furthest < 1e-4 for each in found.values())
    assert all(answer.cached > 0 for answer in got["prefix reuse"][1:])
