from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from jax_mla_cp.checkpoint.convert import convert
from tests.helpers import hf_tensors as hf
from tests.helpers.converted import chunks


@pytest.fixture(scope="session")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face directory in bfloat16; for reading only."""
    path = hf.write(tmp_path_factory.mktemp("convert") / "hf", dtype=torch.bfloat16)
    (path / "LICENSE").write_text("free")
    (path / "chat_template.jinja").write_text("{{ messages }}")
    return path


@pytest.fixture(scope="session")
def made(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The conversion of `source`; for reading only."""
    out = tmp_path_factory.mktemp("made") / "out"
    convert(source, out, progress=False)
    assert chunks(out)
    return out


@pytest.fixture
def out(made: Path, tmp_path: Path) -> Path:
    """A copy of a conversion, to do harm to."""
    return Path(shutil.copytree(made, tmp_path / "out"))
