"""`checkpoint inspect`: either kind of checkpoint, damaged files, values that are not finite."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import jax_mla_cp as mla
from jax_mla_cp.checkpoint import CheckpointError, ConvertedCheckpoint
from jax_mla_cp.checkpoint.__main__ import main
from jax_mla_cp.checkpoint.convert import convert
from jax_mla_cp.default_model import DIRECTORY
from jax_mla_cp.launch import config_and_tokenizer
from tests.helpers.converted import chunks, flip, stop_after


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
    assert "moe.mlp.gate_up" in shown and "routed experts" in shown and "checksums verified" in shown


def test_inspect_finds_damage(out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flip(out / "weights/state/moe.mlp.down/c/1/11/0/0")
    assert inspect(str(out), capsys=capsys)[0] == 0, "sizes are right"
    code, report = inspect(str(out), "--verify", capsys=capsys)
    assert code == 1 and len(report["problems"]) == 1 and "moe.mlp.down/c/1/11/0/0" in report["problems"][0]
    (out / "jax_mla_cp.json").unlink()
    assert main(["inspect", str(out)]) == 1
    assert "jax_mla_cp.json: missing" in capsys.readouterr().err


def test_inspect_checks_the_mtp_layer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bad = Path(shutil.copytree(DIRECTORY, tmp_path / "bad"))
    assert inspect(str(bad), capsys=capsys)[0] == 0
    for shard in bad.glob("*.safetensors"):
        tensors = load_file(shard)
        for name in [name for name in tensors if name.endswith("hnorm.weight")]:
            tensors[name] = tensors[name][:-1].contiguous()
            save_file(tensors, shard)
    code, report = inspect(str(bad), capsys=capsys)
    assert code == 1 and len(report["problems"]) == 1 and "hnorm.weight" in report["problems"][0]


def test_inspect_finds_numbers_that_are_none(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bad = Path(shutil.copytree(source, tmp_path / "bad"))
    shard = sorted(bad.glob("*.safetensors"))[0]
    tensors = load_file(shard)
    name = next(iter(tensors))
    tensors[name].view(-1)[:2] = torch.tensor([float("nan"), float("inf")])
    save_file(tensors, shard)
    code, report = inspect(str(bad), "--verify", capsys=capsys)
    assert code == 1 and report["problems"] == [f"{name}: 2 values are NaN or infinite"]


def test_inspect_calls_a_half_converted_checkpoint_that(out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    manifest = ConvertedCheckpoint.read(out)
    dataclasses.replace(manifest, complete=False, files={}).write()
    written = sorted(chunks(out))
    (out / written[0]).unlink()
    for verify in ([], ["--verify"]):
        code, report = inspect(str(out), *verify, capsys=capsys)
        (problem,) = report["problems"]
        assert code == 1
        assert problem.startswith(f"half-converted: {len(written) - 1} of {len(written)} chunks are written. Finish it")


def test_a_half_converted_directory_is_called_that(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """By whoever reads it; config.json is copied last, and its absence is not the problem."""
    half = tmp_path / "half"
    with monkeypatch.context() as patch:
        stop_after(5, patch)
        with pytest.raises(KeyboardInterrupt):
            convert(source, half, progress=False)
    assert not (half / "config.json").exists()
    problem = ConvertedCheckpoint.read(half).unfinished
    assert problem.endswith(f"Finish it with: python -m jax_mla_cp.checkpoint convert {source} {half}")
    for read in (mla.load, config_and_tokenizer):
        with pytest.raises(CheckpointError) as refused:
            read(half)
        assert str(refused.value) == f"model: {half} is {problem}"
    assert main(["inspect", str(half)]) == 1
    shown = " ".join(capsys.readouterr().out.split())
    assert "half-converted" in shown and "has no config.json" not in shown
    code, report = inspect(str(half), capsys=capsys)
    assert code == 1 and report["problems"] == [problem]


@pytest.mark.parametrize("manifest", [True, False])
def test_a_directory_with_both_kinds_is_called_half_converted(
    manifest: bool, source: Path, out: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Which of them was meant can't be told; either may be older."""
    shard = sorted(source.glob("*.safetensors"))[0]
    shutil.copy(shard, out)
    if not manifest:
        (out / "jax_mla_cp.json").unlink()
    for read in (mla.load, config_and_tokenizer):
        with pytest.raises(
            CheckpointError, match=rf"model: {out} is half-converted: .*{shard.name}.* and a conversion"
        ):
            read(out)
    assert main(["convert", str(out), str(tmp_path / "again")]) == 2
    assert "half-converted" in capsys.readouterr().err
    if manifest:
        code, report = inspect(str(out), capsys=capsys)
        assert code == 1 and report["problems"][0].startswith("half-converted: it holds")
