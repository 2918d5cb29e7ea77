"""README's example and the notebook run as they stand."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient

from jax_mla_cp.serve.server_flags import make_parser

ROOT = Path(__file__).parent.parent


def test_the_readme_example(tmp_path: Path) -> None:
    """With the mesh and without, the same tokens."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    (example,) = [block for block in blocks if "mla.Planner" in block]
    mesh = 'mla.make_mesh("tp=2,cp=4")'
    assert mesh in example
    answers = []
    for code in (example, example.replace(mesh, "None")):
        done = subprocess.run(
            [sys.executable, "-c", code + "\nprint(tokens[-8:], len(prompt), len(tokens))\n"],
            capture_output=True,
            text=True,
            cwd=tmp_path,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr[-2000:]
        answers.append(done.stdout.strip().splitlines()[-1])
    assert answers[0] == answers[1]


def test_the_flag_table_is_complete() -> None:
    """Each flag of the server in one row, and no other."""
    text = (ROOT / "README.md").read_text()
    table = text[text.index("| flag | meaning |") :].split("\n\n")[0]
    named = re.findall(r"`(--[a-z0-9-]+)", "\n".join(row.split(" | ")[0] for row in table.splitlines()))
    has = {flag for action in make_parser()._actions for flag in action.option_strings[:1]} - {"-h"}
    assert sorted(named) == sorted(has)


def test_the_notebook() -> None:
    notebook = nbformat.read(ROOT / "notebooks" / "prefill.ipynb", as_version=4)
    NotebookClient(notebook, timeout=300, kernel_name="python3").execute()
    outputs = [o for cell in notebook.cells if cell.cell_type == "code" for o in cell.outputs]
    assert any("image/png" in o.get("data", {}) for o in outputs), "it draws the zigzag"
