"""The program in process: a small part of its default run, the same on a mesh; and flags that can't work."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from jax_mla_cp import platform
from jax_mla_cp.eval import in_process
from jax_mla_cp.eval.__main__ import main
from jax_mla_cp.eval.eval_options import EvalOptions, parse
from jax_mla_cp.mesh import MeshShape


def evaluate(monkeypatch: pytest.MonkeyPatch, out: Path, *flags: str) -> dict[str, Any]:
    monkeypatch.setattr(platform, "setup", lambda *_: "cpu")  # pytest's process has its devices
    arguments = ["--lengths", "512", "--depths", "3", "--perplexity-tokens", "500", "--compile-cache", "off"]
    assert main([*arguments, "--json", str(out / "out.json"), *flags]) == 0
    return json.loads((out / "out.json").read_text())


def test_the_built_in_model_scores_the_same_on_a_mesh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    plain = evaluate(monkeypatch, tmp_path)
    sharded = evaluate(monkeypatch, tmp_path, "--mesh", "tp=2,cp=2", "--prefill-chunk", "300")
    assert (plain["mesh"], sharded["mesh"]) == ("tp=1,cp=1", "tp=2,cp=2")
    assert plain["device"] == "cpu" and plain["attention"] == "xla" and plain["versions"]["jax"]
    assert [row["prompt_tokens"] for row in plain["rows"]] == [512, 512, 512]
    assert plain["passkey_accuracy"] == 1
    assert sharded["rows"] == plain["rows"]
    assert sharded["perplexity"] == pytest.approx(plain["perplexity"], rel=1e-4)
    assert plain["perplexity_tokens"] == 499 and plain["perplexity"] < 20, "of 3072 words"


def test_a_model_that_fails_ends_the_run_with_what_it_has(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(platform, "setup", lambda *_: "cpu")

    class Falls(in_process.Engine):
        def submit(self, request: Any) -> None:
            request.tokens = [10**9]  # no step can be made of this
            super().submit(request)

    monkeypatch.setattr(in_process, "Engine", Falls)
    flags = ["--lengths", "512", "--depths", "2", "--perplexity-tokens", "0", "--compile-cache", "off"]
    assert main([*flags, "--json", str(tmp_path / "out.json")]) == 1
    assert (
        "The request's next step is invalid and can't be run."
        in json.loads((tmp_path / "out.json").read_text())["stopped"]
    )
    assert "not complete" in capsys.readouterr().out


def test_prompts_that_dont_fit_the_devices_are_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(platform, "setup", lambda *_: "cpu")
    monkeypatch.setattr("jax_mla_cp.platform.device_memory", lambda: 2**20)
    with pytest.raises(SystemExit, match="2"):
        main(["--lengths", "512", "--depths", "2", "--perplexity-tokens", "0", "--compile-cache", "off"])
    assert "--lengths: a prompt and answer of 519 tokens can't be run on these devices" in capsys.readouterr().err


BAD = [
    (["--lengths", "1"], "--lengths: must be whole numbers from 2 to"),
    (["--lengths", "30"], "--lengths: fact and question take"),
    (["--lengths", "512,512"], "--lengths: must be unique"),
    (["--lengths", "5x"], "--lengths: must be whole numbers (K may follow), got '5x'"),
    (["--lengths", "900K"], "positions, of which the answer takes 7. Use lengths of at most"),
    (["--depths", "1"], "--depths: must be whole numbers from 2 to 1000, got 1."),
    (["--perplexity-tokens", "1"], "--perplexity-tokens: must be whole numbers from 2"),
    (["--perplexity-tokens", "15000K"], "--perplexity-tokens: 15360000 needs a text of"),
    (["--lengths", "none", "--perplexity-tokens", "0"], "leave nothing to run"),
    (["--text", "/nonexistent"], "--text: /nonexistent is not a file"),
    (["--text", "{binary}"], "can't be read as UTF-8 text"),
    (["--json", "/nonexistent/a.json"], "the directory /nonexistent does not exist"),
    (["--picture", "a.xls"], "must end in .png, .pdf, .svg"),
    (["--timeout", "0"], "--timeout: must be a number of seconds above 0"),
    (["--timeout", "soon"], "--timeout: must be a number of seconds, got 'soon'"),
    (["--tokenizer", "{empty}"], "--tokenizer: is used with --base-url only"),
    (["--base-url", "http://h/v1", "--tokenizer", "{empty}"], "has no tokenizer.json"),
    (["--base-url", "http://h/v1", "--tokenizer", "/nonexistent"], "--tokenizer: /nonexistent is not a directory"),
    (["--base-url", "localhost:8000"], "--base-url: must be an address like http://"),
    (["--base-url", "http://h/v1", "--mesh", "tp=8"], "--mesh: can't be combined with --base-url"),
    (["--base-url", "http://h/v1", "--prefill-chunk", "8"], "--prefill-chunk: can't be combined with --base-url"),
    (["--mesh", "tp=8,cp"], "'cp' is not AXIS=SIZE"),
    (["--form", "expandd"], "--form: must be one of"),
    (["--model", "/nonexistent"], "not a directory"),
    (["--modl", "x"], "Did you mean --model?"),
]


@pytest.mark.parametrize(("flags", "message"), BAD, ids=[" ".join(flags) for flags, _ in BAD])
def test_settings_that_cant_work(
    flags: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Refused before anything is loaded."""
    monkeypatch.setattr(in_process, "load_model", lambda *_, **__: pytest.fail("weights are loaded"))
    monkeypatch.setattr(platform, "setup", lambda *_: pytest.fail("devices are set up"))
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    places = {"{empty}": str(tmp_path), "{binary}": str(tmp_path / "binary")}
    with pytest.raises(SystemExit, match="2"):
        main([places.get(flag, flag) for flag in flags])
    out, errors = capsys.readouterr()
    assert not out and message in errors and errors.startswith("error: ") and errors.count("\n") == 1


def test_a_picture_needs_matplotlib(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(SystemExit, match="2"):
        parse(["--picture", "a.png"])
    assert "pip install 'jax-mla-cp[eval]'" in capsys.readouterr().err


def test_flags() -> None:
    options = parse(["--lengths", "512,4K", "--mesh", "tp=2,cp=4", "--attention", "xla", "--form", "absorbed"])
    assert options.lengths == (512, 4096)
    assert options.launch.mesh == MeshShape(tp=2, cp=4) and options.launch.form == "absorbed"
    assert parse([]) == EvalOptions()
    assert parse(["--base-url", "http://h/v1", "--served-model-name", "m"]).served_model_name == "m"


def test_help_teaches(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])
    out = capsys.readouterr().out
    assert "examples:" in out and "exit code:" in out and "--base-url" in out and "--mesh" in out
