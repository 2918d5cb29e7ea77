"""A program outside of its environment says which command makes one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from jax_mla_cp.version import program_imports

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("program", ["serve", "eval", "bench", "checkpoint"])
def test_without_jax(program: str) -> None:
    done = subprocess.run(
        [sys.executable, "-S", "-m", f"jax_mla_cp.{program}", "--help"],  # -S: no site-packages
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
    )
    assert done.returncode == 2 and not done.stdout
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert f"`make env` once and then `.venv/bin/python -m jax_mla_cp.{program}`" in done.stderr
    assert "pip install ." in done.stderr and "has no package " in done.stderr


def test_the_library_raises_what_python_raises() -> None:
    done = subprocess.run(
        [sys.executable, "-S", "-c", "import jax_mla_cp"], capture_output=True, text=True, cwd=ROOT, env={}
    )
    assert done.returncode == 1 and "ModuleNotFoundError: No module named" in done.stderr


def test_a_programs_own_imports(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"), program_imports():
        raise ModuleNotFoundError("No module named 'fastapi.x'", name="fastapi.x")
    assert "has no package fastapi. " in capsys.readouterr().err


@pytest.mark.parametrize("error", [ModuleNotFoundError("no", name="jax_mla_cp.nothing"), ImportError("no")])
def test_our_own_mistakes_stay_errors(error: ImportError) -> None:
    with pytest.raises(type(error)), program_imports():
        raise error
