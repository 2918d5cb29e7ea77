"""The result of `pip install` for a user: a wheel with modules, presets and the extension, or the reason why not."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from importlib.util import find_spec
from pathlib import Path

import pytest

from jax_mla_cp.checkpoint import expected_shapes
from jax_mla_cp.config import presets
from jax_mla_cp.config.errors import ConfigError
from jax_mla_cp.default_model import DIRECTORY

ROOT = Path(__file__).resolve().parent.parent
NAMES = ["deepseek_r1", "deepseek_v2", "deepseek_v2_lite", "deepseek_v3", "kimi_k2", "kimi_k25", "tiny"]
COMPILER = next((found for name in ("c++", "g++", "clang++") if (found := shutil.which(name))), None)
VARIABLES = ("JAX_MLA_CP_CUDA", "CXX", "CC", "CUDACXX", "CUDA_HOME", "CUDA_PATH", "FA3_SOURCE_DIR")

# Prints where the package came from, its presets, one number of each, and whether the extension loads.
PROBE = """
import json, jax_mla_cp
from importlib.util import find_spec
from jax_mla_cp.config import presets
extension = find_spec("jax_mla_cp._ffi")
if extension:
    import jax_mla_cp._ffi
heads = {name: presets.model_config(name).num_heads for name in presets.names()}
print(json.dumps([jax_mla_cp.__file__, heads, extension is not None]))
"""


def build(folder: Path, source: Path = ROOT, **variables: str) -> subprocess.CompletedProcess[str]:
    """`pip wheel` of a tree or an archive of it: without the network where the build's requirements are installed (the test extra has
    them), and in a build folder of its own, so that no install into the environment loses its objects."""
    isolation = ["--no-build-isolation"] if find_spec("scikit_build_core") else []
    settings = ["--config-settings", f"build-dir={folder / 'build'}"]
    command = [sys.executable, "-m", "pip", "wheel", "--verbose", "--no-deps", *isolation, *settings]
    environment = {name: value for name, value in os.environ.items() if name not in VARIABLES} | variables
    return subprocess.run(
        [*command, "--wheel-dir", folder, source], env=environment, capture_output=True, text=True, check=False
    )


def built(folder: Path, done: subprocess.CompletedProcess[str]) -> Path:
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = folder.glob("jax_mla_cp-*.whl")
    return wheel


def said(done: subprocess.CompletedProcess[str]) -> str:
    """A build's output, without pip's and CMake's line breaks."""
    return " ".join((done.stdout + done.stderr).split())


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """This tree's wheel with the CPU handlers: CUDA takes minutes."""
    folder = tmp_path_factory.mktemp("wheel")
    return built(folder, build(folder, JAX_MLA_CP_CUDA="0"))


@pytest.fixture
def tools(tmp_path: Path) -> str:
    """A PATH with CMake and its generators, and no compiler."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in ("cmake", "ninja", "make"):
        if found := shutil.which(name):
            (folder / name).symlink_to(found)
    return str(folder)


def test_source_tree_has_every_preset() -> None:
    assert presets.names() == NAMES


@pytest.mark.parametrize(
    ("name", "billions"),
    [
        ("deepseek_v2", 235.7),
        ("deepseek_v2_lite", 15.7),
        ("deepseek_v3", 671.0),
        ("deepseek_r1", 671.0),
        ("kimi_k2", 1026.4),
        ("kimi_k25", 1026.4),
    ],
)
def test_preset_has_the_published_size(name: str, billions: float) -> None:
    shapes = expected_shapes(presets.model_config(name)).values()
    assert sum(math.prod(shape) for shape in shapes) / 1e9 == pytest.approx(billions, abs=0.1)


def test_unknown_preset_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=f"'nosuch' does not exist; there are {', '.join(NAMES)}"):
        presets.model_config("nosuch")


def check_contents(wheel: Path, extensions: int) -> None:
    """The package's modules, data and licenses are in the wheel, `extensions` shared objects, and nothing else."""
    inside = [name for name in zipfile.ZipFile(wheel).namelist() if not name.endswith("/")]
    assert len(inside) == len(set(inside))
    objects = {name for name in inside if name.endswith(".so")}
    assert len(objects) == extensions
    assert all(name.startswith("jax_mla_cp/_ffi.") for name in objects)
    configs = {f"jax_mla_cp/configs/{path.name}" for path in (ROOT / "configs").iterdir()}
    sources = {path.relative_to(ROOT).as_posix() for path in (ROOT / "jax_mla_cp").rglob("*.py*")}
    sources = {name for name in sources if name.endswith((".py", ".pyi"))}
    data = {"jax_mla_cp/py.typed", "jax_mla_cp/default_model/heldout.txt.xz"} | {
        f"jax_mla_cp/default_model/{path.name}"
        for path in DIRECTORY.iterdir()
        if path.suffix in (".json", ".md", ".safetensors")
    }
    page = ROOT / "jax_mla_cp" / "serve" / "status" / "page"
    data |= {f"jax_mla_cp/serve/status/page/{path.name}" for path in page.iterdir()}
    package = {name for name in inside if ".dist-info/" not in name}
    assert package == configs | sources | data | objects
    licenses = {name.partition("/licenses/")[2] for name in inside if "/licenses/" in name}
    assert licenses == {"LICENSE", "THIRD_PARTY_NOTICES.md"}


def test_wheel_is_complete(wheel: Path) -> None:
    check_contents(wheel, extensions=1 if COMPILER else 0)
    assert wheel.name.endswith("-py3-none-any.whl") is (COMPILER is None)


def test_wheel_works_from_an_empty_folder(wheel: Path, tmp_path: Path) -> None:
    site, empty = tmp_path / "site", tmp_path / "empty"
    empty.mkdir()
    zipfile.ZipFile(wheel).extractall(site)  # what pip does, less the scripts
    # Without site (-S), because an editable install of this tree comes before any path; so its folder is named here.
    path = os.pathsep.join([str(site), sysconfig.get_path("purelib"), sysconfig.get_path("platlib")])
    environment = {**os.environ, "PYTHONPATH": path, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-S", "-c", PROBE], cwd=empty, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    location, heads, extension = json.loads(done.stdout)
    assert Path(location).is_relative_to(site)
    assert heads == dict(zip(NAMES, (128, 128, 16, 128, 64, 64, 8), strict=True))
    assert extension is (COMPILER is not None)


def test_without_a_compiler_the_wheel_is_pure_python_and_says_so(tmp_path: Path, tools: str) -> None:
    done = build(tmp_path, PATH=tools, JAX_MLA_CP_CUDA="0")
    wheel = built(tmp_path, done)
    assert wheel.name == "jax_mla_cp-0.1.0-py3-none-any.whl"
    check_contents(wheel, extensions=0)
    assert "WARNING: the C++ extension could not be built" in said(done)
    assert "this is a pure Python install" in said(done)


def test_cuda_is_not_silently_left_out_without_a_compiler(tmp_path: Path, tools: str) -> None:
    done = build(tmp_path, PATH=tools, JAX_MLA_CP_CUDA="1")
    assert done.returncode != 0
    assert "JAX_MLA_CP_CUDA=1 asks for the CUDA kernels, and they could not be built" in said(done)
    assert list(tmp_path.glob("*.whl")) == []


def nvcc(folder: Path, release: str) -> str:
    """An nvcc that knows its release and nothing else."""
    script = folder / "nvcc"
    script.write_text(f"#!/bin/sh\necho 'Cuda compilation tools, release {release}, V{release}.1'\n")
    script.chmod(0o755)
    return str(script)


@pytest.mark.skipif(COMPILER is None, reason="needs a C++ compiler")
@pytest.mark.parametrize(
    ("case", "reason"),
    [
        ("none", "there is no nvcc (looked at CUDACXX='/nowhere/nvcc'"),
        ("old", "is of CUDA 12.2; FlashAttention-3 needs 12.3 or newer."),
        ("source", "FlashAttention-3's source is missing. FA3_SOURCE_DIR: expected a flash-attention checkout"),
        ("value", "JAX_MLA_CP_CUDA: expected 1 (build the CUDA kernels or fail), 0 (don't) or nothing"),
    ],
    ids=["no nvcc", "old nvcc", "no source", "not 0 or 1"],
)
def test_cuda_that_was_asked_for_is_built_or_the_install_fails(tmp_path: Path, case: str, reason: str) -> None:
    variables = {"JAX_MLA_CP_CUDA": "1", "CUDACXX": "/nowhere/nvcc"}
    if case == "old":
        variables["CUDACXX"] = nvcc(tmp_path, "12.2")
    elif case == "source":
        variables |= {"CUDACXX": nvcc(tmp_path, "12.3"), "FA3_SOURCE_DIR": str(tmp_path)}
    elif case == "value":
        variables["JAX_MLA_CP_CUDA"] = "perhaps"
    done = build(tmp_path, **variables)
    assert done.returncode != 0
    assert reason in said(done)
    assert list(tmp_path.glob("*.whl")) == []


def test_source_distribution_builds_the_same_wheel(wheel: Path, tmp_path: Path) -> None:
    """It holds what a build needs, and nothing that was built."""
    make = "import os, sys; from scikit_build_core.build import build_sdist; os.chdir(sys.argv[1]); print(build_sdist(sys.argv[2]))"
    done = subprocess.run([sys.executable, "-c", make, ROOT, tmp_path], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    archive = tmp_path / done.stdout.split()[-1]
    with tarfile.open(archive) as tar:
        inside = {name.partition("/")[2] for name in tar.getnames()}
    tracked = subprocess.run(
        ["git", "ls-files", "ffi", "configs", "jax_mla_cp"], cwd=ROOT, capture_output=True, text=True, check=False
    ).stdout.split()
    assert {"pyproject.toml", "README.md", "LICENSE", "THIRD_PARTY_NOTICES.md", *tracked} <= inside
    assert not [name for name in inside if name.endswith((".so", ".o", ".pyc"))]
    (tmp_path / "wheel").mkdir()
    again = built(tmp_path / "wheel", build(tmp_path / "wheel", archive, JAX_MLA_CP_CUDA="0"))
    assert sorted(zipfile.ZipFile(again).namelist()) == sorted(zipfile.ZipFile(wheel).namelist())
