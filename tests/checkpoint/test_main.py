"""The command line: settings that can't work, and --help."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from jax_mla_cp.checkpoint.__main__ import main

CANT: list[tuple[Callable[[Path, Path], list[str]], str]] = [
    (lambda hf, tmp: ["convert", str(tmp / "none"), str(tmp / "out")], "HF_DIR"),
    (lambda hf, tmp: ["convert", str(hf), str(hf)], "is HF_DIR itself"),
    (lambda hf, tmp: ["convert", str(hf), str(hf / "config.json")], "is a file"),
    (lambda hf, tmp: ["convert", str(hf), str(hf.parent)], "is not empty"),
    (lambda hf, tmp: ["convert", str(hf), "/proc/nowhere/out"], "can't be used"),
    (lambda hf, tmp: ["convert", str(hf)], "OUT"),
    (lambda hf, tmp: ["convert", str(hf), "out", "--overwrit"], "--overwrit"),
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
