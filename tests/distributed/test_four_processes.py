"""The mesh of this project's first command, tp=8,cp=4: 32 devices over four processes."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.helpers.answer_sheet import Sheet, compare, fill
from tests.helpers.processes import cluster, server, url_of

FLAGS = (
    *("--platform", "cpu", "--page-size", "16", "--kv-pages", "8", "--max-model-len", "48"),
    *("--prefill-chunk", "16", "--max-running", "1"),
)
QUESTIONS = [Sheet("a prompt", [{"prompt": [300 + i * i % 97 for i in range(16)], "max_tokens": 6}])]
"""Four tokens on each rank, so that prefill and decode are one program."""


@pytest.mark.slow
def test_four_processes_answer_as_one_device(tmp_path: Path) -> None:
    with server(*FLAGS) as process:
        want = fill(url_of(process), QUESTIONS)["a prompt"]
    # 32 devices on few cores: silence is no sign.
    with cluster(tmp_path, 4, *FLAGS, "--mesh", "tp=8,cp=4", "--heartbeat-timeout", "120") as running:
        got = fill(running.wait_until_ready(), QUESTIONS)["a prompt"]
        for i in range(4):
            assert f"this is process {i} on " in running.log(i) and f": 8 x cpu cp={i} tp=0-7" in running.log(i)
        running.stop(120)
    found = compare(want, got)
    assert not found.wrong and found.ties == 0
    assert found.furthest < 1e-4
