"""What a user gets from `pip install`: a wheel carries the presets, and they are found from any folder."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import zipfile
from importlib.util import find_spec
from pathlib import Path

import pytest

from jax_mla_cp import presets
from jax_mla_cp.checkpoint import expected_shapes
from jax_mla_cp.config import ConfigError

ROOT = Path(__file__).resolve().parent.parent
NAMES = ["deepseek_r1", "deepseek_v3", "kimi_k2", "tiny"]

# Prints where the package came from, its presets, and one number of each.
PROBE = """
import json, jax_mla_cp
from jax_mla_cp import presets
print(json.dumps([jax_mla_cp.__file__, {name: presets.model_config(name).num_heads for name in presets.names()}]))
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """This tree's wheel, built without the network where the build backend is installed (the test extra has it)."""
    folder = tmp_path_factory.mktemp("wheel")
    isolation = ["--no-build-isolation"] if find_spec("hatchling") else []
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", *isolation, "--wheel-dir", folder, ROOT]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (built,) = folder.glob("jax_mla_cp-*.whl")
    return built


def test_source_tree_has_every_preset() -> None:
    assert presets.names() == NAMES


@pytest.mark.parametrize(("name", "billions"), [("deepseek_v3", 671.0), ("deepseek_r1", 671.0), ("kimi_k2", 1026.4)])
def test_preset_has_the_published_size(name: str, billions: float) -> None:
    shapes = expected_shapes(presets.model_config(name)).values()
    assert sum(math.prod(shape) for shape in shapes) / 1e9 == pytest.approx(billions, abs=0.1)


def test_unknown_preset_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"'nosuch' does not exist.*deepseek_r1, deepseek_v3, kimi_k2, tiny"):
        presets.model_config("nosuch")


def test_wheel_is_complete(wheel: Path) -> None:
    inside = zipfile.ZipFile(wheel).namelist()
    configs = {f"jax_mla_cp/configs/{path.name}" for path in (ROOT / "configs").iterdir()}
    modules = {path.relative_to(ROOT).as_posix() for path in (ROOT / "jax_mla_cp").rglob("*.py")}
    assert configs | modules | {"jax_mla_cp/py.typed"} <= set(inside)
    assert len(inside) == len(set(inside))
    strays = [name for name in inside if not name.startswith("jax_mla_cp/") and ".dist-info/" not in name]
    assert strays == []


def test_wheel_finds_its_presets_from_an_empty_folder(wheel: Path, tmp_path: Path) -> None:
    site, empty = tmp_path / "site", tmp_path / "empty"
    empty.mkdir()
    zipfile.ZipFile(wheel).extractall(site)  # what pip does with a pure wheel, less the scripts
    # First on the path, so ahead of an editable install of this tree; its location is checked below.
    environment = {**os.environ, "PYTHONPATH": str(site), "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-c", PROBE], cwd=empty, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    location, heads = json.loads(done.stdout)
    assert Path(location).is_relative_to(site)
    assert heads == {"deepseek_r1": 128, "deepseek_v3": 128, "kimi_k2": 64, "tiny": 8}
