"""`bench serve` against a server whose every delay is known."""

from __future__ import annotations

import asyncio
import json
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse

from jax_mla_cp.bench.__main__ import main
from jax_mla_cp.bench.serve.client_options import parse
from jax_mla_cp.bench.serve.workload import Lengths, SharedPrefix, arrivals, plan
from jax_mla_cp.config.errors import ConfigError
from tests.helpers.fake_server import running
from tests.helpers.processes import started
from tests.helpers.waiting import until

FIRST, GAP = 0.2, 0.03
"""Seconds until the first token, and between tokens."""


class Fake:
    """Answers each request in that time, whatever else it has to do; a prompt that begins with 7 gets `fault`."""

    def __init__(self) -> None:
        self.bodies: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.tokenizes, self.usage = True, True
        self.fault = ""
        self.pieces: list[bytes] = []
        """A whole answer, in place of the usual one, in the pieces that the network brings."""
        self.first, self.gap = FIRST, GAP
        self.app = FastAPI()

        @self.app.get("/v1/models")
        def models() -> Any:
            return {"data": [{"id": "fake"}]}

        @self.app.get("/version")
        def version() -> Any:
            return {"version": "1.2.3"}

        @self.app.post("/tokenize")
        def tokenize(body: dict[str, Any]) -> Response:
            words = body["prompt"].split()
            return JSONResponse({"tokens": [10 + i for i in range(len(words))]} if self.tokenizes else {}, 200)

        @self.app.post("/v1/completions")
        async def completions(body: dict[str, Any], request: Request) -> Response:
            self.bodies.append(body)
            self.headers.append(dict(request.headers))
            index = len(self.bodies)
            if self.fault == "not text":
                return Response(b"\xff\xfe bad gateway", 502, media_type="text/html")
            if self.pieces:
                return StreamingResponse(self._in_pieces(), media_type="text/event-stream")
            if self.fault == "refuse" or (self.fault == "every third" and index % 3 == 0):
                return JSONResponse({"error": {"message": "The queue is full."}}, 503)
            return StreamingResponse(self._stream(body), media_type="text/event-stream")

    async def _stream(self, body: dict[str, Any]) -> AsyncIterator[str]:
        def chunk(choices: list[Any], **more: Any) -> str:
            return f"data: {json.dumps({'choices': choices, **more})}\n\n"

        await asyncio.sleep(self.first)
        for i in range(body["max_tokens"]):
            if i:
                await asyncio.sleep(self.gap)
            if self.fault == "cut off" and i == 2:
                return
            yield ": a comment\n" + chunk([{"index": 0, "text": "x", "finish_reason": None}])
        yield chunk([{"index": 0, "text": "", "finish_reason": "length"}])
        if self.usage:
            prompt = len(body["prompt"])
            details = {"cached_tokens": 5}
            usage = {"prompt_tokens": prompt, "completion_tokens": body["max_tokens"], "prompt_tokens_details": details}
            yield chunk([], usage=usage)
        yield "data: [DONE]\n\n"

    async def _in_pieces(self) -> AsyncIterator[bytes]:
        for piece in self.pieces:
            yield piece
            await asyncio.sleep(self.gap)


def event(text: str | None = None, *, reason: str | None = None, end: str = "\n\n", **more: Any) -> bytes:
    choices = [] if text is None else [{"index": 0, "text": text, "finish_reason": reason}]
    return f"data: {json.dumps({'choices': choices, **more})}{end}".encode()


@pytest.fixture
def fake() -> Iterator[tuple[Fake, str]]:
    server = Fake()
    with running(server.app) as url:
        yield server, url


def measure(url: str, tmp_path: Path, *flags: str) -> tuple[int, dict[str, Any]]:
    file = tmp_path / "out.json"
    code = main(["serve", "--base-url", url, "--json", str(file), *flags])
    return code, json.loads(file.read_text())


def row(found: dict[str, Any], what: str) -> dict[str, Any]:
    return next(row for row in found["rows"] if row["what"] == what)


def test_what_is_known_is_measured(
    fake: tuple[Fake, str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    server, url = fake
    monkeypatch.setenv("FAKE_KEY", "secret")
    picture = tmp_path / "load.png"
    code, found = measure(
        url,
        tmp_path,
        "--requests",
        "20",
        "--rate",
        "40",
        "--prompt-tokens",
        "10-30",
        "--output-tokens",
        "4-8",
        "--goodput",
        "ttft:10s,itl:10s",
        "--picture",
        str(picture),
        "--api-key-env",
        "FAKE_KEY",
    )
    assert code == 0 and picture.read_bytes().startswith(b"\x89PNG")
    ttft, itl, tpot, e2e = (row(found, name) for name in ("TTFT", "ITL", "TPOT", "E2E"))
    # A busy machine makes everything later, nothing earlier.
    assert (
        FIRST * 1e3 <= ttft["p50"] <= FIRST * 1e3 + 1000 and ttft["p50"] <= ttft["p90"] <= ttft["p99"] <= ttft["most"]
    )
    assert ttft["p50"] <= e2e["p50"] - 2.5 * GAP * 1e3, "three gaps and more follow each"
    assert itl["mean"] >= 0.9 * GAP * 1e3 and itl["mean"] == pytest.approx(tpot["mean"], rel=0.5)
    assert itl["mean"] * itl["n"] == pytest.approx(20 * (e2e["mean"] - ttft["mean"]), rel=0.2)
    asked = [body["max_tokens"] for body in server.bodies]
    assert itl["n"] == sum(asked) - 20 and set(asked) == {4, 5, 6, 7, 8}
    assert e2e["p50"] >= (FIRST + 3 * GAP) * 1e3
    total = row(found, "all requests")
    prompts = [body["prompt"] for body in server.bodies]
    assert total["out_tokens"] == sum(asked) and total["in_tokens"] == sum(map(len, prompts))
    assert total["cached_tokens"] == 100 and total["succeeded"] == 20
    assert total["out_tokens_s"] == pytest.approx(sum(asked) / total["seconds"])
    assert row(found, "ttft <= 10000 ms, itl <= 10000 ms")["fraction"] == 1
    assert all(isinstance(token, int) for prompt in prompts for token in prompt) and min(map(len, prompts)) >= 10
    assert all(headers["authorization"] == "Bearer secret" for headers in server.headers)
    assert found["versions"]["server version"] == "1.2.3" and found["model"] == "fake" and "device" in found
    text = capsys.readouterr().out
    assert "TTFT" in text and "p99" in text and "goodput" in text and "secret" not in json.dumps(found) + text


def test_slow_answers_delay_nothing(fake: tuple[Fake, str], tmp_path: Path) -> None:
    """Coordinated omission: the times of sending are those planned, and waiting for a slot counts."""
    server, url = fake
    server.first = 0.5
    flags = (
        "--requests",
        "6",
        "--rate",
        "50",
        "--output-tokens",
        "1",
        "--prompt-tokens",
        "8",
        "--goodput",
        "ttft:900ms",
    )
    _, free = measure(url, tmp_path, *flags)
    assert row(free, "sent late")["most"] < 400 and row(free, "all requests")["most_in_flight"] == 6
    assert [r["at"] for r in free["requests"]] == sorted(r["at"] for r in free["requests"])
    _, capped = measure(url, tmp_path, *flags, "--concurrency", "2")
    assert row(capped, "all requests")["most_in_flight"] == 2
    # Six requests, two at a time, half a second each: the last two wait for a second before they are sent.
    assert row(capped, "TTFT")["most"] >= 1300 and row(capped, "sent late")["most"] >= 800
    assert row(capped, "ttft <= 900 ms")["requests"] == 2
    assert [r["at"] for r in capped["requests"]] == [r["at"] for r in free["requests"]]
    sent = [body["prompt"] for body in server.bodies]
    assert sorted(sent[:6]) == sorted(sent[6:]), "the same seed sends the same prompts"


def test_failures_are_counted_by_kind(
    fake: tuple[Fake, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server, url = fake
    flags = ("--requests", "6", "--rate", "inf", "--output-tokens", "3", "--prompt-tokens", "8", "--goodput", "ttft:9s")
    server.fault = "every third"
    code, found = measure(url, tmp_path, *flags)
    assert code == 0 and row(found, "HTTP 503") == {
        "table": "failures",
        "what": "HTTP 503",
        "n": 2,
        "message": "The queue is full.",
    }
    assert row(found, "TTFT")["n"] == 4 and row(found, "ttft <= 9000 ms")["fraction"] == pytest.approx(4 / 6)
    server.fault = "cut off"
    code, found = measure(url, tmp_path, *flags)
    assert code == 1 and row(found, "stream cut off")["n"] == 6 and row(found, "TTFT")["n"] == 0
    server.fault, server.first = "", 5.0
    code, found = measure(url, tmp_path, *flags, "--timeout", "0.3")
    assert code == 1 and row(found, "timeout")["n"] == 6
    assert "timeout" in capsys.readouterr().out


def test_a_server_without_tokenizer_and_usage(fake: tuple[Fake, str], tmp_path: Path) -> None:
    server, url = fake
    server.tokenizes = server.usage = False
    code, found = measure(
        url, tmp_path, "--requests", "2", "--rate", "inf", "--prompt-tokens", "9", "--output-tokens", "3"
    )
    assert code == 0 and found["prompts"] == "words"
    assert all(len(body["prompt"].split()) == 9 for body in server.bodies)
    assert row(found, "all requests")["out_tokens"] == 6 and row(found, "all requests")["in_tokens"] == 18


USAGE = {"prompt_tokens": 8, "completion_tokens": 6, "prompt_tokens_details": None}


def test_other_servers_streams(fake: tuple[Fake, str], tmp_path: Path) -> None:
    """Line ends, comments, names, empty events, chunks of several tokens, and pieces that end anywhere."""
    server, url = fake
    flags = ("--requests", "1", "--rate", "inf", "--output-tokens", "6", "--prompt-tokens", "8")
    end = "\r\n\r\n"
    whole = event("c d", end=end)
    server.pieces = [
        b": ping\r\n\r\nevent: message\r\n" + event("a", end=end, usage=None),
        b"data:\r\n\r\nid: 7\r\n" + event("b", end=end)[:9],
        event("b", end=end)[9:] + whole[:-3],
        whole[-3:] + b"data:" + event("e f", reason="length", end=end)[6:],
        event(end=end, usage=USAGE) + b"data: [DONE]",
    ]
    code, found = measure(url, tmp_path, *flags)
    assert code == 0, found["rows"]
    assert row(found, "all requests")["out_tokens"] == 6 and row(found, "ITL")["n"] == 3
    (request,) = found["requests"]
    a, b, c, e = request["chunks"]
    assert b >= a + 1.8 * GAP and e == c >= b + 0.9 * GAP, "an event is there when its end is"
    # Of six tokens in four chunks: the mean time of the five after the first.
    assert row(found, "TPOT")["mean"] == pytest.approx((e - a) / 5 * 1e3)


@pytest.mark.parametrize(
    ("pieces", "kind", "message"),
    [
        ([event("a"), event(error={"message": "out of pages"})], "error in the stream", "out of pages"),
        (
            [event("a"), b'data: {"object": "error", "message": "out of pages"}\n\n'],
            "error in the stream",
            "out of pages",
        ),
        ([event("a", reason="abort")], "finish_reason abort", "stop or length"),
        ([b"data: 5\n\n"], "not a completion", "5"),
        ([b"data: {\n\n"], "not a completion", "{"),
        ([event("a", usage=[1])], "not a completion", "usage"),
        ([event("a", usage={"prompt_tokens_details": 3})], "not a completion", "usage"),
        ([event("a", usage={"completion_tokens": None}), event("", reason="stop")], None, ""),
        ([event("", reason="stop")], "no tokens", "empty"),
        ([b"data: [DONE]\n\n"], "stream cut off", "finish_reason"),
    ],
)
def test_odd_answers(
    pieces: list[bytes], kind: str | None, message: str, fake: tuple[Fake, str], tmp_path: Path
) -> None:
    server, url = fake
    server.gap, server.pieces = 0, pieces
    code, found = measure(
        url, tmp_path, "--requests", "2", "--rate", "inf", "--output-tokens", "3", "--prompt-tokens", "8"
    )
    if kind is None:
        assert code == 0 and row(found, "all requests")["out_tokens"] == 2
    else:
        assert code == 1 and row(found, kind)["n"] == 2 and message in row(found, kind)["message"]


def test_an_error_page_in_another_encoding(fake: tuple[Fake, str], tmp_path: Path) -> None:
    server, url = fake
    server.fault = "not text"
    code, found = measure(url, tmp_path, "--requests", "2", "--output-tokens", "3", "--prompt-tokens", "8")
    assert code == 1 and "bad gateway" in row(found, "HTTP 502")["message"]


def test_more_requests_than_open_files(fake: tuple[Fake, str], tmp_path: Path) -> None:
    """Shells allow 1024; the client takes what the system allows."""
    file = tmp_path / "out.json"
    command = [
        sys.executable,
        "-m",
        "jax_mla_cp.bench",
        "serve",
        "--base-url",
        fake[1],
        "--requests",
        "80",
        "--rate",
        "inf",
        "--prompt-tokens",
        "8",
        "--output-tokens",
        "3",
        "--json",
        str(file),
    ]
    subprocess.run(
        ["bash", "-c", 'ulimit -Sn 50; exec "$@"', "bash", *command], check=True, timeout=120, capture_output=True
    )
    assert row(json.loads(file.read_text()), "all requests")["most_in_flight"] == 80


def test_ctrl_c_before_the_first_request(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("jax_mla_cp.bench.serve.load_generator.LoadGenerator.prepare", stop)
    assert main(["serve", "--base-url", "http://127.0.0.1:9/v1"]) == 130
    assert capsys.readouterr().err == "stopped before the first request.\n"


def test_tables_are_shown_though_the_file_cant_be_written(
    fake: tuple[Fake, str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("jax_mla_cp.bench.serve.load_report.LoadReport.save", full)
    with pytest.raises(SystemExit):
        main(["serve", "--base-url", fake[1], "--requests", "1", "--output-tokens", "1", "--json", str(tmp_path / "a")])
    said = capsys.readouterr()
    assert "TTFT" in said.out and "error: --json" in said.err and "No space left on device" in said.err


def test_ctrl_c_prints_what_there_is(fake: tuple[Fake, str], tmp_path: Path) -> None:
    server, url = fake
    file = tmp_path / "out.json"
    flags = ("--requests", "500", "--rate", "20", "--prompt-tokens", "8", "--output-tokens", "3", "--json", str(file))
    with started("jax_mla_cp.bench", "serve", "--base-url", url, *flags) as process:
        until(lambda: len(server.bodies) >= 15, 60)
        process.send_signal(signal.SIGINT)
        out, errors = process.communicate(timeout=30)
    assert process.returncode == 130 and "Traceback" not in errors, errors
    found = json.loads(file.read_text())
    assert found["stopped"] and row(found, "TTFT")["n"] >= 1 and row(found, "not finished")["n"] >= 400
    assert "stopped with Ctrl-C" in out and "TTFT" in out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--base-url", "localhost"], "must be an address like"),
        (["--base-url", "http://127.0.0.1:9/v1"], "gives no list of models (no connection"),
        (["--rate", "0"], "--rate: must be a number above 0"),
        (["--rate", "nan"], "--rate: must be a number above 0"),
        (["--requests", "0"], "--requests"),
        (["--prompt-tokens", "9-3"], "lognormal:MEDIAN:SIGMA:MAX"),
        (["--prompt-tokens", "lognormal:512:0.8"], "lognormal:MEDIAN:SIGMA:MAX"),
        (["--shared-prefix", "100"], "TOKENS:GROUPS"),
        (["--goodput", "ttft:500ms,ttft:1s"], "each once"),
        (["--goodput", "latency:1s"], "ttft, itl, tpot, e2e"),
        (["--api-key-env", "NO_SUCH_KEY"], "the environment has no NO_SUCH_KEY"),
        (["--picture", "load.bmp"], "must end in .png"),
        (["--reqests", "3"], "Did you mean --requests"),
        ([""], "'': no such flag"),
        (["=3"], "'': no such flag"),
        (["--json", "/"], "--json: / is not a file"),
    ],
)
def test_settings_that_cant_work(flags: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    base = [] if "--base-url" in flags else ["--base-url", "http://127.0.0.1:9/v1"]
    with pytest.raises(SystemExit) as ended:
        main(["serve", *base, *flags])
    assert ended.value.code == 2 and message in capsys.readouterr().err


def test_no_such_model(fake: tuple[Fake, str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["serve", "--base-url", fake[1], "--model", "other"])
    assert "Use one of fake." in capsys.readouterr().err


def test_distributions() -> None:
    rng = np.random.default_rng(0)
    assert set(Lengths.parse("", "7").draw(50, rng)) == {7}
    assert set(Lengths.parse("", "3-5").draw(200, rng)) == {3, 4, 5}
    drawn = np.asarray(Lengths.parse("", "lognormal:100:0.5:150").draw(4000, rng))
    assert drawn.max() <= 150 and 0.4 <= (drawn < 90).mean() <= 0.65
    for burstiness, spread in ((1.0, 1.0), (4.0, 0.5), (0.25, 2.0)):
        gaps = np.diff(arrivals(20000, 5.0, burstiness, rng))
        assert gaps.mean() == pytest.approx(0.2, rel=0.05)
        assert gaps.std() / gaps.mean() == pytest.approx(spread, rel=0.05), "a gamma's shape is 1 / spread^2"
    assert arrivals(3, float("inf"), 1.0, rng) == [0.0] * 3


def test_shared_prefixes_are_shared_and_nothing_else() -> None:
    what: dict[str, Any] = {
        "requests": 40,
        "burstiness": 1.0,
        "prompt_tokens": Lengths(20, 20),
        "output_tokens": Lengths(1, 9),
        "seed": 3,
    }
    planned = plan(range(1000), rate=1.0, shared_prefix=SharedPrefix(50, 3), **what)
    heads: dict[int | None, set[tuple[Any, ...]]] = {}
    for each in planned:
        assert len(each.prompt) == each.prompt_tokens == 70
        heads.setdefault(each.group, set()).add(tuple(each.prompt[:50]))
    assert set(heads) == {0, 1, 2} and all(len(found) == 1 for found in heads.values())
    assert len({tuple(each.prompt[50:54]) for each in planned}) == 40
    faster = plan(range(1000), rate=9.0, shared_prefix=SharedPrefix(50, 3), **what)
    assert [p.prompt for p in faster] == [p.prompt for p in planned] and faster[-1].at < planned[-1].at


def test_defaults_are_those_that_help_tells() -> None:
    options = parse(["--base-url", "http://h/v1"])
    assert (options.requests, options.rate, options.prompt_tokens, options.output_tokens.low) == (
        100,
        1.0,
        Lengths(512, 512),
        64,
    )
    with pytest.raises(ConfigError, match="timeout: must be"):
        type(options)("http://h/v1", timeout=float("inf"))
