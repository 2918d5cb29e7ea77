"""Conversions that are interrupted, resumed, repeated and refused."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

import jax_mla_cp as mla
import jax_mla_cp.checkpoint.convert as converting
from jax_mla_cp.checkpoint import CheckpointError, open_converted
from jax_mla_cp.checkpoint.convert import convert
from jax_mla_cp.checkpoint.directories import alone
from jax_mla_cp.checkpoint.orbax import StoredArray
from jax_mla_cp.config.errors import ConfigError
from tests.helpers.converted import chunks, stop_after


def test_stopped_anywhere_it_goes_on(source: Path, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        stop_after(40, patch)
        with pytest.raises(KeyboardInterrupt):
            convert(source, out, progress=False)
    with pytest.raises(
        CheckpointError, match=r"half-converted: .* Finish it with: python -m jax_mla_cp.checkpoint convert"
    ):
        mla.load(out, progress=False)
    (out / "weights/state/embed/c/0/0").write_bytes(b"cut off")
    (out / "weights/state/embed/c/0/0.__lock").write_bytes(b"of a run that was killed")
    done = convert(source, out, progress=False)
    assert done.skipped == 39 and done.slices > 80, "the one that was damaged is written again"
    assert chunks(out) == chunks(made)
    assert {p.name for p in out.iterdir()} == {p.name for p in made.iterdir()} and not list(out.rglob("*.__lock"))
    open_converted(out)


def test_stopped_before_there_is_a_tree(
    source: Path, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, real = tmp_path / "out", StoredArray.open

    def stopping(self: StoredArray, weights: Path, **how: bool) -> Any:
        if self.name == "head":
            raise KeyboardInterrupt
        return real(self, weights, **how)

    with monkeypatch.context() as patch:
        patch.setattr(StoredArray, "open", stopping)
        with pytest.raises(KeyboardInterrupt):
            convert(source, out, progress=False)
    assert not (out / "weights").exists()
    assert convert(source, out, progress=False).skipped == 0
    assert chunks(out) == chunks(made)


SLOW = """
import sys, time
from jax_mla_cp.checkpoint import convert
from jax_mla_cp.checkpoint.__main__ import main
read = convert._Slice.read
convert._Slice.read = lambda *args: (time.sleep(0.05), read(*args))[1]
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_stopped_by_a_signal(source: Path, made: Path, tmp_path: Path, number: signal.Signals) -> None:
    out = tmp_path / "out"
    command = [sys.executable, "-c", SLOW, "convert", str(source), str(out)]
    run = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    until = time.monotonic() + 120
    while len(chunks(out)) < 5 and time.monotonic() < until:
        time.sleep(0.02)
    run.send_signal(number)
    errors = run.communicate(timeout=60)[1]
    if number != signal.SIGKILL:
        assert run.returncode == 130 and "Traceback" not in errors
        assert f"Resume with: python -m jax_mla_cp.checkpoint convert {source} {out}" in errors
    assert 5 <= len(chunks(out)) < len(chunks(made))
    assert convert(source, out, progress=False).skipped >= 5
    assert chunks(out) == chunks(made)


def test_one_at_a_time(source: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with alone(tmp_path / "out"), pytest.raises(mla.ConfigError, match="another process"):
        convert(source, tmp_path / "out", progress=False)


def test_complete_is_left_alone_and_repaired(source: Path, out: Path) -> None:
    before = chunks(out)
    done = convert(source, out, progress=False)
    assert done.skipped == done.slices
    (out / "weights/state/head/c/0/0").unlink()
    for name in ("config.json", "weights/state/_METADATA", "weights/state/embed/zarr.json"):
        (out / name).write_text("{")
    (out / "weights/_CHECKPOINT_METADATA").unlink()
    done = convert(source, out, progress=False)
    assert done.skipped == done.slices - 1
    mla.load(out, progress=False)
    open_converted(out)
    assert chunks(out) == before


def test_another_source_is_refused(source: Path, out: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(source, tmp_path / "other"))
    shard = sorted(other.glob("*.safetensors"))[0]
    os.utime(shard, (1, 1))
    with pytest.raises(CheckpointError, match=r"conversion of another checkpoint.*--overwrite"):
        convert(other, out, progress=False)
    open_converted(out)
    done = convert(other, out, overwrite=True, progress=False)
    assert done.skipped == 0
    open_converted(out)


def test_somebody_elses_weights_stay(source: Path, tmp_path: Path) -> None:
    """A folder of that name makes no converted checkpoint: neither OUT, which would be deleted, nor HF_DIR, which is refused."""
    foreign = tmp_path / "foreign"
    (foreign / "weights").mkdir(parents=True)
    (foreign / "weights" / "thesis.bin").write_bytes(b"years of work")
    with pytest.raises(ConfigError, match="is not empty, and not a converted checkpoint"):
        convert(source, foreign, overwrite=True, progress=False)
    assert (foreign / "weights" / "thesis.bin").read_bytes() == b"years of work"
    shutil.copytree(source, foreign, dirs_exist_ok=True)
    convert(foreign, tmp_path / "made", progress=False)
    open_converted(tmp_path / "made")


def test_all_that_a_server_needs_is_there(source: Path, made: Path) -> None:
    names = {path.name for path in made.iterdir()}
    assert {"config.json", "generation_config.json", "LICENSE", "chat_template.jinja"} <= names
    assert not any(name.endswith((".safetensors", "index.json")) for name in names)


def test_disk_that_is_full(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**5, 10**5, 1000))
        with pytest.raises(CheckpointError, match=r"needs 0.\d\d GB more, its disk has 0.00 GB free"):
            convert(source, tmp_path / "out", progress=False)

    def full(*args: Any) -> Any:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(converting, "_remove_temporary_files", full)
        with pytest.raises(
            CheckpointError, match=r"the disk is full\. Nothing written is lost\. Resume with: python -m"
        ):
            convert(source, tmp_path / "out", progress=False)
    assert convert(source, tmp_path / "out", progress=False).skipped > 80


def test_git_lfs_pointers_are_not_copied(source: Path, tmp_path: Path) -> None:
    cloned = Path(shutil.copytree(source, tmp_path / "cloned"))
    (cloned / "tokenizer.json").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 9\n")
    with pytest.raises(CheckpointError, match=r"tokenizer.json: a Git LFS pointer"):
        convert(cloned, tmp_path / "out", progress=False)
