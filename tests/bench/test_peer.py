"""`bench peer`: what it computes from the runs, the engine in this process, and a server that answers wrongly."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI

from jax_mla_cp.bench.__main__ import main
from jax_mla_cp.bench.peer.peer_options import PeerOptions
from jax_mla_cp.bench.peer.work import Work
from jax_mla_cp.config.errors import ConfigError
from tests.helpers.fake_server import FakeServer, running
from tests.helpers.processes import environment


class Fixed:
    """Takes 1 s, 0.1 s for each prompt token and 0.01 s for each step; the first run takes a minute more."""

    def __init__(self) -> None:
        self.runs: list[tuple[list[list[int]], int]] = []

    def metadata(self) -> dict[str, Any]:
        return {}

    def run(self, prompts: Sequence[list[int]], output_tokens: int) -> float:
        self.runs.append((list(prompts), output_tokens))
        return 1 + 0.1 * sum(map(len, prompts)) + 0.01 * output_tokens + 60 * (len(self.runs) == 1)


def test_what_is_computed() -> None:
    target = Fixed()
    work = Work(target, 50, (33, 161), 3)
    assert work.time_to_first_token(8)["ms"] == pytest.approx(1810)
    assert [(len(prompts), n) for prompts, n in target.runs] == [(1, 1)] * 4
    row = work.decode_step(4, 16)
    assert row["ms"] == pytest.approx(10) and row["tokens_per_s"] == pytest.approx(400)
    steps = target.runs[4:]
    assert [n for _, n in steps] == [33] + [33] * 3 + [161] * 3
    assert all([len(p) for p in prompts] == [16] * 4 for prompts, _ in steps)
    prompts = [tuple(p) for runs, _ in target.runs for p in runs]
    assert len(set(prompts)) == len(prompts), "a prefix cache has nothing to find"
    assert {token for p in prompts for token in p} <= set(range(10, 50))


def test_in_process(tmp_path: Path) -> None:
    """The built-in model; the process has devices already, so that another one runs it."""
    flags = [
        "peer",
        "--platform",
        "cpu",
        "--ttft",
        "40",
        "--shapes",
        "2x24",
        "--generate",
        "2,5",
        "--samples",
        "1",
        "--json",
    ]
    done = subprocess.run(
        [sys.executable, "-m", "jax_mla_cp.bench", *flags, str(tmp_path / "out.json")],
        capture_output=True,
        text=True,
        env=environment(),
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    report = json.loads((tmp_path / "out.json").read_text())
    assert [(row["what"], row["requests"], row["context"]) for row in report["rows"]] == [
        ("time to first token", 1, 40),
        ("decode step", 2, 24),
    ]
    assert report["rows"][0]["ms"] > 0 and report["engine"] == "jax_mla_cp, in process"


def short_of(asked: int) -> tuple[FakeServer, FastAPI]:
    """A server that answers with as many tokens as it is asked for, or one less if that is `asked`."""

    def reply(path: str, body: Any, usual: dict[str, Any]) -> Any:
        if path == "/completions":
            usual["usage"]["completion_tokens"] = body["max_tokens"] - (body["max_tokens"] == asked)
        return usual

    fake = FakeServer(reply, answer=lambda prompt: "")
    return fake, fake.app()


def test_a_server(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A row whose answers are wrong fails; the others stay."""
    out = tmp_path / "out.json"
    fake, app = short_of(5)
    with running(app) as url:
        flags = f"peer --base-url {url} --ttft 20 --shapes 3x8 --generate 2,4 --samples 1 --json {out}"
        assert main(flags.split()) == 0
        bodies = fake.bodies.copy()
        assert json.loads(out.read_text())["engine"] == url
        assert main(flags.replace("2,4", "2,5").split()) == 1
    assert {(len(body["prompt"]), body["max_tokens"]) for body in bodies} == {(20, 1), (8, 2), (8, 4)}
    assert all(body["ignore_eos"] and body["temperature"] == 0 and body["model"] == "fake" for body in bodies)
    rows = json.loads(out.read_text())["rows"]
    assert "error" not in rows[0] and "5 tokens were asked for with ignore_eos, 4 came" in rows[1]["error"]
    assert "4 came" in capsys.readouterr().out


def test_refused(capsys: pytest.CaptureFixture[str]) -> None:
    for flags, message in (
        ("--generate 5,5", "--generate: must be two numbers of tokens, the second one larger, got 5,5"),
        ("--ttft none --shapes none", "--ttft"),
        ("--base-url http://127.0.0.1:1/v1", "--base-url: http://127.0.0.1:1/v1: "),
        ("--base-url http://127.0.0.1:1/v1 --mesh tp=2", "--mesh: can't be combined with --base-url"),
        ("--base-url localhost", "--base-url: must be an address like"),
        ("--shapes 64", "must be REQUESTSxCONTEXT"),
    ):
        with pytest.raises(SystemExit) as end:
            main(["peer", *flags.split()])
        assert end.value.code == 2
        assert message in capsys.readouterr().err, flags
    with pytest.raises(ConfigError, match="samples"):
        PeerOptions(samples=0)
