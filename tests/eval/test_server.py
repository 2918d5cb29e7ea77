"""Against a running server: a fake one that reads its prompts, and this project's own."""

from __future__ import annotations

import json
import math
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from jax_mla_cp.default_model import DIRECTORY
from jax_mla_cp.default_model.heldout import heldout_text
from jax_mla_cp.engine import Engine
from jax_mla_cp.eval.__main__ import main
from jax_mla_cp.serve.served_model import ServedModel
from jax_mla_cp.tokenizer import Tokenizer, require_tokenizer
from tests.helpers.fake_server import FakeServer, refuse, running
from tests.helpers.in_process import serving
from tests.helpers.processes import started
from tests.helpers.standin import PageModel
from tests.helpers.waiting import until

SMALL = ["--lengths", "400,700", "--depths", "3", "--perplexity-tokens", "600"]


@pytest.fixture(scope="module", autouse=True)
def _short_text() -> Iterator[None]:
    """The whole of it takes half a second to tokenize."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("jax_mla_cp.eval.__main__.heldout_text", lambda: heldout_text()[:40_000])
        yield


def evaluate(fake: FakeServer, out: Path, *flags: str) -> tuple[int, dict[str, Any]]:
    with running(fake.app()) as url:
        code = main(["--base-url", url, *SMALL, "--json", str(out / "out.json"), *flags])
    return code, json.loads((out / "out.json").read_text())


def test_a_server_that_reads_its_prompts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fake = FakeServer()
    code, found = evaluate(fake, tmp_path, "--picture", str(tmp_path / "map.png"))
    assert code == 0 and found["stopped"] is None
    assert found["passkey_accuracy"] == 1 and len(found["rows"]) == 6
    assert found["perplexity"] == pytest.approx(math.exp(2)), "without the token that was generated"
    assert (found["model"], found["mesh"], found["device"]) == ("fake", None, None)
    asked = [body for body in fake.bodies if not body.get("echo")]
    assert {(body["model"], body["temperature"], body["max_tokens"]) for body in asked} == {("fake", 0, 7)}
    by_key = {row["expected"]: row["prompt_tokens"] for row in found["rows"]}
    assert len(by_key) == 6 and len(set(by_key.values())) > 1, "the server's own counts"
    assert "passkey accuracy 1.0000 (6 of 6)" in capsys.readouterr().out
    assert (tmp_path / "map.png").stat().st_size > 1000


def test_a_wrong_answer_is_a_wrong_answer(tmp_path: Path) -> None:
    def change(path: str, body: Any, reply: dict[str, Any]) -> Any:
        if path == "/completions" and len(body["prompt"]) > 3000 and not body.get("echo"):
            reply["choices"][0]["text"] = " I don't know"
        return reply

    code, found = evaluate(FakeServer(change), tmp_path, "--lengths", "400,3K")
    assert code == 0 and found["passkey_accuracy"] == 0.5
    assert {row["got"] for row in found["rows"] if not row["correct"]} == {" I don't know"}
    assert {row["length"] for row in found["rows"] if not row["correct"]} == {3072}


@pytest.mark.parametrize("how", ["refused", "ignored"])
def test_a_server_without_echo_has_no_perplexity(how: str, tmp_path: Path) -> None:
    def change(path: str, body: Any, reply: dict[str, Any]) -> Any:
        if path == "/completions" and body.get("echo"):
            if how == "refused":
                return refuse(400, "echo: not here")
            reply["choices"][0]["logprobs"]["token_logprobs"] = [-1.0]
        return reply

    code, found = evaluate(FakeServer(change), tmp_path)
    assert code == 0 and found["passkey_accuracy"] == 1 and found["perplexity"] is None
    assert ("echo: not here" if how == "refused" else "without log-probabilities") in found["no_perplexity"]


FAULTS = [
    (lambda body, reply: refuse(500, "out of memory"), "status 500: out of memory"),
    (lambda body, reply: refuse(400, "at most 512 tokens"), "status 400: at most 512 tokens"),
    (lambda body, reply: {"choices": []}, "no usage.prompt_tokens"),
    (lambda body, reply: {**reply, "choices": []}, "no choices.0.text"),
    (lambda body, reply: time.sleep(3), "no answer within --timeout 1 seconds"),
]


@pytest.mark.parametrize(("fault", "message"), FAULTS, ids=[message for _, message in FAULTS])
def test_a_server_that_fails_ends_the_run(fault: Any, message: str, tmp_path: Path) -> None:
    """With what it has answered so far, and without asking it again."""
    count = 0

    def change(path: str, body: Any, reply: dict[str, Any]) -> Any:
        nonlocal count
        if path == "/completions" and not body.get("echo"):
            count += 1
            if count <= 2:
                return reply
            time.sleep(0.5)  # until the first two have been read
            return fault(body, reply)
        return reply

    code, found = evaluate(FakeServer(change), tmp_path, "--timeout", "1")
    assert code == 1 and message in found["stopped"]
    assert [row["correct"] for row in found["rows"]] == [True, True]
    assert found["perplexity"] is not None and count <= 6


@pytest.mark.parametrize(
    ("models", "flags", "message"),
    [
        (["a", "b"], [], "has several models. Use one of a, b."),
        (["a"], ["--served-model-name", "c"], "has no model 'c'. Use one of a."),
        (None, [], "GET /models has no list of models"),
    ],
)
def test_which_model(
    models: list[str] | None, flags: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    fake = FakeServer() if models else FakeServer(lambda path, body, reply: {"object": "list"})
    fake.models = models or []
    with running(fake.app()) as url, pytest.raises(SystemExit, match="2"):
        main(["--base-url", url, *SMALL, *flags])
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("url", ["http://127.0.0.1:9/v1", "{url}/nothing", "http://[::1"])
def test_no_server(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    with running(FakeServer().app()) as real, pytest.raises(SystemExit, match="2"):
        main(["--base-url", url.replace("{url}", real), *SMALL])
    assert "Give the address of an OpenAI server with its /v1" in capsys.readouterr().err


def test_a_server_needs_aiohttp(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(SystemExit, match="2"):
        main(["--base-url", "http://127.0.0.1:9/v1", *SMALL])
    assert "--base-url: aiohttp is missing" in (error := capsys.readouterr().err)
    assert "pip install 'jax-mla-cp[eval]'" in error


def test_ctrl_c_shows_what_has_been_answered(tmp_path: Path) -> None:
    def change(path: str, body: Any, reply: dict[str, Any]) -> Any:
        if path == "/completions" and not body.get("echo"):
            answered.append(body)
            if len(answered) > 2:
                time.sleep(2)
        return reply

    answered: list[Any] = []
    with running(FakeServer(change).app()) as url:
        flags = ("--base-url", url, *SMALL, "--json", str(tmp_path / "o.json"))
        with started("jax_mla_cp.eval", *flags) as process:
            # Four at a time: the last two are asked when the first two answers have come.
            until(lambda: len(answered) == 6, 120)
            process.send_signal(signal.SIGINT)
            out, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert "not complete: stopped with Ctrl-C" in out and "(2 of 2; 6 asked)" in out and "Traceback" not in errors
    assert len(json.loads((tmp_path / "o.json").read_text())["rows"]) == 2


def test_this_projects_own_server(tmp_path: Path) -> None:
    """Over the stand-in model, whose answers are noise, and which refuses echo."""
    model = PageModel(pages=1200, max_running=8, prefill_chunk=512)
    with serving(ServedModel("standin", Engine(model), tokenizer(), 100_000, 4000, (), None)) as url:
        code = main(["--base-url", f"{url}/v1", *SMALL, "--json", str(tmp_path / "out.json")])
    found = json.loads((tmp_path / "out.json").read_text())
    assert code == 0 and found["stopped"] is None and found["model"] == "standin"
    assert [row["prompt_tokens"] for row in found["rows"]] == [400] * 3 + [700] * 3, "text of exactly so many tokens"
    assert found["passkey_accuracy"] == 0


def tokenizer() -> Tokenizer:
    return require_tokenizer(Tokenizer.from_dir(DIRECTORY, 100_000))
