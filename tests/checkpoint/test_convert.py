"""Conversions that are stopped, repeated, refused or damaged; and the command line around them."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import jax_mla_cp as mla
import jax_mla_cp.checkpoint.convert as converting
from jax_mla_cp.checkpoint import CheckpointError, open_converted
from jax_mla_cp.checkpoint.__main__ import main
from jax_mla_cp.checkpoint.convert import convert
from jax_mla_cp.checkpoint.directories import alone
from jax_mla_cp.checkpoint.orbax import StoredArray
from jax_mla_cp.config.errors import ConfigError
from jax_mla_cp.launch import config_and_tokenizer
from tests.helpers import hf_tensors as hf


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = hf.write(tmp_path_factory.mktemp("convert") / "hf", dtype=torch.bfloat16)
    (path / "LICENSE").write_text("free")
    (path / "chat_template.jinja").write_text("{{ messages }}")
    return path


@pytest.fixture(scope="module")
def made(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("made") / "out"
    convert(source, out, progress=False)
    return out


@pytest.fixture
def out(made: Path, tmp_path: Path) -> Path:
    """A copy of a conversion, to do harm to."""
    return Path(shutil.copytree(made, tmp_path / "out"))


def chunks(out: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(out)): path.read_bytes() for path in out.glob("weights/state/*/c/**/*") if path.is_file()
    }


def stop_after(pieces: int, monkeypatch: pytest.MonkeyPatch) -> None:
    real, read = converting._Piece.read, iter(range(pieces))

    def stopping(self: Any, *of: Any) -> Any:
        if next(read, None) is None:
            raise KeyboardInterrupt
        return real(self, *of)

    monkeypatch.setattr(converting._Piece, "read", stopping)


def test_stopped_anywhere_it_goes_on(source: Path, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        stop_after(40, patch)
        with pytest.raises(KeyboardInterrupt):
            convert(source, out, progress=False)
    with pytest.raises(
        CheckpointError, match=r"not complete\. Finish it with: python -m jax_mla_cp.checkpoint convert"
    ):
        mla.load(out, progress=False)
    (out / "weights/state/embed/c/0/0").write_bytes(b"cut off")
    (out / "weights/state/embed/c/0/0.__lock").write_bytes(b"of a run that was killed")
    done = convert(source, out, progress=False)
    assert done.kept == 39 and done.pieces > 80, "the one that was damaged is written again"
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
    assert convert(source, out, progress=False).kept == 0
    assert chunks(out) == chunks(made)


SLOW = """
import sys, time
from jax_mla_cp.checkpoint import convert
from jax_mla_cp.checkpoint.__main__ import main
read = convert._Piece.read
convert._Piece.read = lambda *args: (time.sleep(0.05), read(*args))[1]
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
        assert f"go on with: python -m jax_mla_cp.checkpoint convert {source} {out}" in errors
    assert 5 <= len(chunks(out)) < len(chunks(made))
    assert convert(source, out, progress=False).kept >= 5
    assert chunks(out) == chunks(made)


def test_one_at_a_time(source: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with alone(tmp_path / "out"), pytest.raises(mla.ConfigError, match="another process"):
        convert(source, tmp_path / "out", progress=False)


def test_complete_is_left_alone_and_repaired(source: Path, out: Path) -> None:
    before = chunks(out)
    done = convert(source, out, progress=False)
    assert done.kept == done.pieces
    (out / "weights/state/head/c/0/0").unlink()
    for name in ("config.json", "weights/state/_METADATA", "weights/state/embed/zarr.json"):
        (out / name).write_text("{")
    (out / "weights/_CHECKPOINT_METADATA").unlink()
    done = convert(source, out, progress=False)
    assert done.kept == done.pieces - 1
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
    assert done.kept == 0
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


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def grow(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\n")


FILES = [
    "config.json",
    "generation_config.json",
    "chat_template.jinja",
    "jax_mla_cp.json",
    "weights/_CHECKPOINT_METADATA",
    "weights/commit_success.txt",
    "weights/state/_METADATA",
    "weights/state/moe.mlp.down/zarr.json",
    "weights/state/moe.mlp.down/c/1/11/0/0",
    "weights/state/final_norm/c/0",
    "weights/orbax.checkpoint",
]


def test_damage_is_found_and_named(out: Path) -> None:
    kinds = {path.name for path in out.rglob("*") if path.is_file() and "c" not in path.parent.parts[len(out.parts) :]}
    assert kinds == {Path(name).name for name in FILES if "/c/" not in name} | {"LICENSE"}, "every kind of file is here"
    for name in FILES:
        path = out / name
        whole = path.read_bytes()
        for harm in (Path.unlink, cut, flip, grow) if whole else (Path.unlink, grow):
            harm(path)
            with pytest.raises(CheckpointError) as caught:
                mla.load(out, progress=False)
            assert str(path) in str(caught.value), (name, harm, str(caught.value))
            path.write_bytes(whole)
    mla.load(out, progress=False)


def test_all_damaged_files_in_one_error(out: Path) -> None:
    for name in ("weights/state/moe.mlp.down/c/0/3/0/0", "config.json"):
        (out / name).unlink()
    cut(out / "weights/state/embed/c/0/0")
    with pytest.raises(CheckpointError, match="3 damaged files") as caught:
        open_converted(out)
    assert "moe.mlp.down/c/0/3/0/0: missing" in str(caught.value) and "embed/c/0/0: expected" in str(caught.value)


def test_unknown_layout(out: Path) -> None:
    raw = json.loads((out / "jax_mla_cp.json").read_text())
    (out / "jax_mla_cp.json").write_text(json.dumps(raw | {"layout": 2}))
    with pytest.raises(CheckpointError, match=r"layout 2; this version of jax_mla_cp reads layout 1"):
        open_converted(out)


def test_disk_that_is_full(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**5, 10**5, 1000))
        with pytest.raises(CheckpointError, match=r"needs 0.\d\d GB more, its disk has 0.00 GB free"):
            convert(source, tmp_path / "out", progress=False)

    def full(*args: Any) -> Any:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(converting, "_remove_leftovers", full)
        with pytest.raises(CheckpointError, match=r"its disk is full\. What is written stays; go on with: python -m"):
            convert(source, tmp_path / "out", progress=False)
    assert convert(source, tmp_path / "out", progress=False).kept > 80


CANT: list[tuple[Callable[[Path, Path], list[str]], str]] = [
    (lambda hf, tmp: ["convert", str(tmp / "none"), str(tmp / "out")], "HF_DIR: "),
    (lambda hf, tmp: ["convert", str(hf), str(hf)], "is HF_DIR itself. Name"),
    (lambda hf, tmp: ["convert", str(hf), str(hf / "config.json")], "is a file"),
    (lambda hf, tmp: ["convert", str(hf), str(hf.parent)], "is not empty"),
    (lambda hf, tmp: ["convert", str(hf), "/proc/nowhere/out"], "can't be used"),
    (lambda hf, tmp: ["convert", str(hf)], "OUT"),
    (lambda hf, tmp: ["convert", str(hf), "out", "--overwrit"], "--overwrit"),
    (lambda hf, tmp: ["inspect", str(tmp / "none")], "error: DIR: "),
    (lambda hf, tmp: ["inspect", str(tmp / "none")], "is not a directory"),
    (lambda hf, tmp: ["inspect", str(hf), "--mesh", "tp=x"], "whole number"),
    (lambda hf, tmp: ["inspect", str(hf), "--mesh", "tp=3"], "num_attention_heads"),
    (lambda hf, tmp: ["inspect", str(hf), "--mesh", "tp=2", "--ep-axes", "pp"], "--ep-axes"),
    (lambda hf, tmp: ["show", str(hf)], "convert"),
    (lambda hf, tmp: [], "COMMAND"),
]


@pytest.mark.parametrize(("flags", "message"), CANT)
def test_settings_that_cant_work(
    flags: Callable[[Path, Path], list[str]],
    message: str,
    source: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    try:
        code = main(flags(source, tmp_path))
    except SystemExit as left:
        code = left.code
    error = capsys.readouterr().err
    assert code == 2 and error.startswith("error: ") and message in error and error.count("\n") == 1


@pytest.mark.parametrize("command", [[], ["convert"], ["inspect"]])
def test_help_teaches(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main([*command, "--help"])
    assert "checkpoint" in capsys.readouterr().out


def inspect(*flags: str, capsys: pytest.CaptureFixture[str]) -> tuple[int, dict[str, Any]]:
    code = main(["inspect", *flags, "--json"])
    return code, json.loads(capsys.readouterr().out)


def test_inspect_either_kind(source: Path, made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, two = (inspect(str(where), "--mesh", "tp=2,cp=2", "--verify", capsys=capsys) for where in (source, made))
    assert one[0] == two[0] == 0 and one[1]["problems"] == two[1]["problems"] == []
    for key in ("parameters", "bytes", "dtypes", "groups", "device", "model_type"):
        if key == "groups":
            assert one[1][key].keys() == two[1][key].keys()
        assert one[1][key] == two[1][key], key
    assert one[1]["model_type"] == "deepseek_v3" and list(one[1]["dtypes"]) == ["bfloat16"]
    assert two[1]["verified"]["checksums"] and not one[1]["verified"]["checksums"]
    assert main(["inspect", str(made), "--tensors", "--mesh", "tp=2", "--verify"]) == 0
    shown = capsys.readouterr().out
    assert "moe.mlp.gate_up" in shown and "routed experts" in shown and "checksums checked" in shown


def test_a_half_converted_directory_is_called_that(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    half = tmp_path / "half"
    with monkeypatch.context() as patch:
        stop_after(5, patch)
        with pytest.raises(KeyboardInterrupt):
            convert(source, half, progress=False)
    assert not (half / "config.json").exists()
    told = (
        f"{half} is an unfinished conversion: its weights are not complete. "
        f"Finish it with: python -m jax_mla_cp.checkpoint convert {source} {half}"
    )
    for read in (mla.load, config_and_tokenizer):
        with pytest.raises(CheckpointError) as refused:
            read(half)
        assert str(refused.value) == f"model: {told}"
    assert main(["inspect", str(half)]) == 1
    shown = " ".join(capsys.readouterr().out.split())
    assert "is an unfinished conversion" in shown and "has no config.json" not in shown
    code, report = inspect(str(half), capsys=capsys)
    assert code == 1 and report["problems"][0] == told


def test_inspect_finds_damage(out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flip(out / "weights/state/moe.mlp.down/c/1/11/0/0")
    assert inspect(str(out), capsys=capsys)[0] == 0, "sizes are right"
    code, report = inspect(str(out), "--verify", capsys=capsys)
    assert code == 1 and len(report["problems"]) == 1 and "moe.mlp.down/c/1/11/0/0" in report["problems"][0]
    (out / "jax_mla_cp.json").unlink()
    assert main(["inspect", str(out)]) == 1
    assert "jax_mla_cp.json: missing" in capsys.readouterr().err


def test_inspect_finds_numbers_that_are_none(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bad = Path(shutil.copytree(source, tmp_path / "bad"))
    shard = sorted(bad.glob("*.safetensors"))[0]
    tensors = load_file(shard)
    name = next(iter(tensors))
    tensors[name].view(-1)[:2] = torch.tensor([float("nan"), float("inf")])
    save_file(tensors, shard)
    code, report = inspect(str(bad), "--verify", capsys=capsys)
    assert code == 1 and report["problems"] == [f"{name}: 2 numbers are not finite"]
