"""The server as a user starts it: a process, on a 32-device mesh, and with settings that can't work."""

from __future__ import annotations

import json
import signal
import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil
import pytest

from jax_mla_cp.config.model import ModelConfig
from jax_mla_cp.default_model import DIRECTORY
from jax_mla_cp.default_model.heldout import heldout_text
from jax_mla_cp.eval.passkey import Passkey
from jax_mla_cp.serve.token_texts import TokenTexts
from jax_mla_cp.tokenizer import Tokenizer
from tests.helpers.checkpoints import hf_generate
from tests.helpers.processes import server, url_of

Checkpoints = Callable[[str], tuple[dict[str, Any], Path]]


def built_in_tokenizer() -> Tokenizer:
    tokenizer = Tokenizer.from_dir(DIRECTORY, ModelConfig.from_dir(DIRECTORY).vocab_size)
    assert tokenizer is not None
    return tokenizer


@pytest.fixture(scope="module")
def tiny() -> Iterator[str]:
    with server("--mesh", "tp=8,cp=4") as process:
        yield url_of(process)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 0, "Ctrl-C ends it cleanly"
    assert "Traceback" not in errors
    told = " ".join(errors.split())
    steps = ("reading weights: ", "sizing the KV cache: ", "no warmup: ", "compiling 1 of ")
    assert [step for step in steps if step not in told] == [], "each long step says so"
    assert [told.index(step) for step in steps] == sorted(told.index(step) for step in steps)


def test_a_compilation_shows_in_the_status(tiny: str) -> None:
    """First in this file: the server has not compiled a program for a step yet."""
    body = {"model": "jax-mla-cp-tiny", "prompt": "Hello", "max_tokens": 1}
    seen = []
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(httpx.post, f"{tiny}/v1/completions", json=body, timeout=300)
        while not answer.done():
            now = httpx.get(f"{tiny}/status", timeout=60).json()["compiling"]
            seen += [now] if now is not None else []
            time.sleep(0.02)
    assert answer.result().status_code == 200
    assert seen, "the request waited for its program"
    assert all(now["done"] == 0 < now["total"] and now["tokens"] > 0 for now in seen)
    assert [now["seconds"] for now in seen] == sorted(now["seconds"] for now in seen)
    assert httpx.get(f"{tiny}/status", timeout=60).json()["compiling"] is None


def test_the_built_in_model_answers_eight_at_once(tiny: str) -> None:
    client = openai.OpenAI(base_url=f"{tiny}/v1", api_key="none", max_retries=0, timeout=300)
    model = client.models.list().data[0].id

    def both(length: int) -> tuple[str, str]:
        arguments: dict[str, Any] = {
            "model": model,
            "prompt": [t * t % 256 for t in range(length)],
            "max_tokens": 12,
            "temperature": 0.8,
            "seed": 5,
        }
        streamed = "".join(c.choices[0].text for c in client.completions.create(**arguments, stream=True))
        return streamed, client.completions.create(**arguments).choices[0].text

    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(both, [1, 7, 30, 100, 500, 1000, 2000, 3000]))
    for streamed, whole in answers:
        assert streamed == whole, "the same seed gives the same text in any batch"
    prompt = "Context parallelism is"
    text = client.completions.create(model=model, prompt=prompt, max_tokens=8, temperature=0)
    assert text.usage is not None and text.usage.prompt_tokens == len(built_in_tokenizer().encode(prompt))
    assert httpx.get(f"{tiny}/health").status_code == 200


def test_a_passkey_in_8k_tokens(tiny: str) -> None:
    client = openai.OpenAI(base_url=f"{tiny}/v1", api_key="none", max_retries=0, timeout=300)
    key, wrong = Passkey("amber falcon", "48213"), Passkey("amber otter", "90577")
    lines = heldout_text().splitlines()
    length = len(built_in_tokenizer().encode("\n".join(lines[:400]))) / 400
    lines = lines[: int(8100 / length)]
    lines[len(lines) // 3], lines[len(lines) // 2] = key.fact(), wrong.fact()
    prompt = "\n".join([*lines, key.question()])
    answer = client.completions.create(model="jax-mla-cp-tiny", prompt=prompt, max_tokens=6, temperature=0)
    assert answer.usage is not None and 7000 < answer.usage.prompt_tokens < 9500
    assert answer.choices[0].text.strip() == "48213"


def test_speculation_changes_no_answer(tiny: str) -> None:
    """On one device, with drafts, and prompts in chunks: the same greedy tokens."""
    flags = (
        "--speculative",
        "mtp",
        "--draft-tokens",
        "2",
        "--prefill-chunk",
        "26",
        "--max-running",
        "2",
        "--max-model-len",
        "128",
        "--form",
        "absorbed",
    )
    with server(*flags) as process:
        clients = [openai.OpenAI(base_url=f"{url}/v1", api_key="none") for url in (tiny, url_of(process))]
        prompts = [[t * t % 256 for t in range(length)] for length in (3, 70)]
        arguments: dict[str, Any] = {
            "model": clients[0].models.list().data[0].id,
            "prompt": prompts,
            "max_tokens": 16,
            "temperature": 0,
        }
        want, got = ([c.text for c in client.completions.create(**arguments).choices] for client in clients)
        assert got == want
        counts = httpx.get(f"{clients[1].base_url}".removesuffix("v1/") + "health").json()["speculation"]
        assert counts["drafted"] > 0
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    assert f"{counts['accepted']} of {counts['drafted']} drafts accepted" in " ".join(errors.split())


def test_a_checkpoint_that_transformers_wrote(
    checkpoint: Checkpoints, transformers_model: Callable[[str], Any]
) -> None:
    """Greedy answers of the server at cp=4, with prompts longer than a chunk, are transformers' own."""
    config, path = checkpoint("v3")
    with server("--model", str(path), "--mesh", "cp=4,tp=2", "--prefill-chunk", "50", "--page-size", "7") as process:
        client = openai.OpenAI(base_url=f"{url_of(process)}/v1", api_key="none", max_retries=0, timeout=300)
        prompts = [[(7 * i + t) % config["vocab_size"] for t in range(n)] for i, n in enumerate((1, 8, 60, 230))]
        want = hf_generate(transformers_model("v3"), prompts, 16)

        def tokens(prompt: list[int]) -> list[str]:
            answer = client.completions.create(
                model=path.name,
                prompt=prompt,
                max_tokens=16,
                temperature=0,
                logprobs=1,
                extra_body={"ignore_eos": True},
            ).choices[0]
            assert answer.logprobs is not None and answer.logprobs.tokens is not None
            return answer.logprobs.tokens

        with ThreadPoolExecutor(4) as pool:
            got = list(pool.map(tokens, prompts))
        names = TokenTexts(Tokenizer.from_dir(path, config["vocab_size"]))
        assert got == [[names(int(i)) for i in ids] for ids in want]
        process.terminate()
        process.communicate(timeout=60)
    assert process.returncode == 0, "SIGTERM ends it cleanly"


BAD = [
    (["--mesh", "tp=3"], "num_attention_heads=8"),
    (["--mesh", "tp=8,cp"], "'cp' is not AXIS=SIZE"),
    (["--mesh", "pp=2"], "one of tp, cp, dp"),
    (["--mesh", "tp=0"], "whole number from 1"),
    (["--mesh", "cp=2,cp=2"], "given twice"),
    (["--model", "/nonexistent"], "not a directory"),
    (["--model", "{empty}"], "no config.json"),
    (["--port", "99999"], "65535"),
    (["--page-size", "0"], "--page-size"),
    (["--prefill-chunk", "0"], "--prefill-chunk"),
    (["--memory-fraction", "1.5"], "at most 1"),
    (["--kv-pages", "99999999"], "--kv-pages: must be at most"),
    (["--max-model-len", "30000"], "20480 positions"),
    (["--max-model-len", "500", "--kv-pages", "2"], "2 pages of 64 hold 128 tokens"),
    (["--attention", "fa3"], "--attention: fa3 can't run: its kernels are for bfloat16, the model runs in float32"),
    (["--platform", "cuda"], "cuda needs a GPU"),
    (["--ep-axes", "cp"], "--ep-axes"),
    (["--dtype", "float16"], "--dtype"),
    (["--weights", "int8"], "--weights: must be one of auto | bf16 | fp8"),
    (["--compile-cache", "/proc/nothing"], "can't be written"),
    (["--draft-tokens", "2"], "Add --speculative mtp"),
    (["--speculative", "mtp", "--draft-tokens", "5"], "from 1 to 4"),
    (["--speculative", "ntp"], "Did you mean mtp"),
    (["--mseh", "tp=1"], "Did you mean --mesh"),
    (["--api-key-file", "/nonexistent"], "--api-key-file: /nonexistent can't be read (No such file"),
    (["--ssl-certfile", "/nonexistent"], "--ssl-certfile: /nonexistent can't be read (No such file"),
]


@pytest.mark.parametrize(("flags", "message"), BAD, ids=[" ".join(flags) for flags, _ in BAD])
def test_settings_that_cant_work(flags: list[str], message: str, tmp_path: Path) -> None:
    with server(*(flag.replace("{empty}", str(tmp_path)) for flag in flags)) as process:
        out, errors = process.communicate(timeout=120)
    assert process.returncode == 2, errors
    assert not out, "it never said that it is ready"
    assert message in " ".join(errors.split()) and "Traceback" not in errors
    assert any(line.startswith("error: ") for line in errors.splitlines())


def test_an_occupied_port_is_known_at_once() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken, server("--port", str(taken.getsockname()[1])) as process:
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 2 and "can't listen there" in errors
    assert "loaded" not in errors, "before a model is loaded"


def test_help_teaches() -> None:
    with server("--help") as process:
        out, _ = process.communicate(timeout=60)
    assert "examples:" in out and "--prefill-chunk" in out


DRAINS = ("--max-model-len", "4000", "--max-running", "2", "--form", "absorbed")


@pytest.mark.parametrize("cut_off", [False, True])
def test_sigterm_lets_what_runs_finish(cut_off: bool) -> None:
    """A stream goes on to its end or, with a second signal, doesn't; what is new gets 503; the exit code tells."""
    key = "a-key-for-this-test-0123"
    flags = (*DRAINS, "--log-format", "json", "--drain-timeout", "100")
    with server(*flags, JAX_MLA_CP_API_KEY=key) as process:
        url = url_of(process)
        heard = {c.laddr.ip for c in psutil.Process(process.pid).net_connections() if c.status == psutil.CONN_LISTEN}
        assert heard == {"127.0.0.1"}, "nothing else listens, and not to other machines (CVE-2025-32444)"
        assert httpx.get(f"{url}/v1/models").status_code == 401
        client = openai.OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0, timeout=100)
        arguments: dict[str, Any] = {"model": "jax-mla-cp-tiny", "prompt": "Once", "extra_body": {"ignore_eos": True}}
        stream = client.completions.create(**arguments, max_tokens=1000 if cut_off else 150, stream=True)
        chunks = [next(stream)]
        process.send_signal(signal.SIGTERM)
        while httpx.get(f"{url}/ready").status_code != 503:
            time.sleep(0.01)
        with pytest.raises(openai.InternalServerError) as refused:
            client.completions.create(**arguments, max_tokens=1)
        assert refused.value.status_code == 503 and refused.value.code == "stopping"
        if cut_off:
            process.send_signal(signal.SIGTERM)
            with pytest.raises((openai.APIError, httpx.HTTPError)):
                chunks += stream
        else:
            chunks += stream
            assert chunks[-1].choices[0].finish_reason == "length"
        _, errors = process.communicate(timeout=60)
    assert process.returncode == int(cut_off)
    assert "Traceback" not in errors and key not in errors
    if not cut_off:
        lines = [json.loads(line) for line in errors.splitlines()]
        (done,) = [line for line in lines if line.get("output_tokens") == 150]
        assert done["status"] == 200 and done["finish"] == "length" and done["ttft_s"] <= done["total_s"]


def test_ctrl_c_while_it_starts() -> None:
    with server("--mesh", "tp=8,cp=4", "--compile-cache", "off") as process:
        assert process.stderr is not None
        process.stderr.readline()  # the first log line: it is loading
        time.sleep(0.5)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 0 and "Traceback" not in errors
