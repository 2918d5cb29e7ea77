"""Calls each target under NVIDIA's compute-sanitizer: no access outside of the arrays."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

_SANITIZER = shutil.which("compute-sanitizer")

# Keys that end with their array, a page table wider than any row, padding tokens, rows without tokens.
_CALLS = """
from tests.helpers import attention_cases as cases
from tests.helpers.attention_cases import ABSORBED, RAGGED, TARGETS

for target in TARGETS:
    for heads in (1, 3):
        case = cases.absorbed(RAGGED, heads, 64, spare=0) if target in ABSORBED else cases.expanded(RAGGED, heads)
        case.check(target)
        print("checked", target, heads)
"""


@pytest.mark.slow
@pytest.mark.skipif(_SANITIZER is None, reason="compute-sanitizer is not on the PATH")
def test_memcheck() -> None:
    # An allocation per array: in XLA's pool, reads past an array's end hit valid memory.
    environment = {"XLA_PYTHON_CLIENT_ALLOCATOR": "platform", "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    done = subprocess.run(
        [str(_SANITIZER), "--tool", "memcheck", sys.executable, "-c", _CALLS],
        cwd=Path(__file__).parents[2],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=900,
    )
    output = done.stdout + done.stderr
    assert done.stdout.count("checked") == 6, output[-4000:]
    assert "ERROR SUMMARY: 0 errors" in output, output[-4000:]
