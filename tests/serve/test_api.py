"""The HTTP surface over the stand-in model, driven by the real `openai` client and by raw requests."""

from __future__ import annotations

import itertools
import json
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import openai
import pytest
from pydantic import ValidationError

from jax_mla_cp.engine import Engine
from jax_mla_cp.serve import preprocessing
from jax_mla_cp.serve.schemas.base import RequestBody
from jax_mla_cp.serve.schemas.chat import ChatRequest
from jax_mla_cp.serve.schemas.completions import CompletionRequest
from jax_mla_cp.serve.served_model import ServedModel
from jax_mla_cp.serve.tokens import DetokenizeRequest, TokenizeRequest
from tests.helpers.byte_tokenizer import byte_tokenizer
from tests.helpers.engine_requests import is_idle
from tests.helpers.in_process import serving
from tests.helpers.standin import VOCAB, PageModel, continuation
from tests.helpers.waiting import until

MAX_LEN = 600
TOKENIZER = byte_tokenizer()


class Server:
    def __init__(self, draft_tokens: int = 0, **served: Any) -> None:
        self.model = PageModel(pages=400, max_running=8, draft_tokens=draft_tokens)
        self.engine = Engine(self.model, max_queued=8)
        # 259 ids, so that BOS (256) is one; the stand-in's answers are below 251. Token 3 is its end of sequence.
        self.served = ServedModel("tiny", self.engine, TOKENIZER, 259, MAX_LEN, (3,), None, **served)
        self._running = serving(self.served)

    def start(self) -> None:
        self.url = self._running.__enter__()

    def stop(self) -> None:
        self._running.__exit__(None, None, None)


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    server = Server()
    server.start()
    yield server
    server.stop()


@pytest.fixture(scope="module")
def client(server: Server) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


def text_of(tokens: list[int]) -> str:
    return TOKENIZER.decode([t for t in tokens if t != 3])


def until_idle(server: Server) -> None:
    """Every page has been given back, and no step is in flight."""
    until(lambda: is_idle(server.engine) and server.engine._pipeline.running_since is None)


def test_completion(client: openai.OpenAI) -> None:
    answer = client.completions.create(model="tiny", prompt="Hello", max_tokens=20, temperature=0)
    want = continuation([256, *b"Hello"], 20, frozenset({3}))
    assert answer.choices[0].text == text_of(want)
    assert answer.choices[0].finish_reason == ("stop" if want[-1] == 3 else "length")
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (6, len(want))


def test_eos_ends_unless_ignored(client: openai.OpenAI) -> None:
    prompt = next([n] for n in range(250) if 3 in continuation([n], 60))
    stopped = client.completions.create(model="tiny", prompt=prompt, max_tokens=60)
    assert stopped.choices[0].finish_reason == "stop"
    ignored = client.completions.create(model="tiny", prompt=prompt, max_tokens=60, extra_body={"ignore_eos": True})
    assert ignored.usage is not None and ignored.usage.completion_tokens == 60


def test_eight_at_once_streaming_and_not(client: openai.OpenAI, server: Server) -> None:
    def both(length: int) -> tuple[str, str, str]:
        prompt = [(length + t) % VOCAB for t in range(length)]
        arguments = {"model": "tiny", "prompt": prompt, "max_tokens": 30}
        chunks = list(client.completions.create(**arguments, stream=True))
        whole = client.completions.create(**arguments).choices[0].text
        return "".join(c.choices[0].text for c in chunks), whole, text_of(continuation(prompt, 30, frozenset({3})))

    with ThreadPoolExecutor(8) as pool:
        for streamed, whole, want in pool.map(both, [1, 2, 17, 64, 100, 300, 400, 500]):
            assert streamed == whole == want
    until_idle(server)


def test_many_prompts_usage_and_logprobs(client: openai.OpenAI) -> None:
    chunks = list(
        client.completions.create(
            model="tiny",
            prompt=[[1, 2], [5]],
            max_tokens=4,
            stream=True,
            stream_options={"include_usage": True},
            logprobs=2,
        )
    )
    assert chunks[-1].choices == [] and chunks[-1].usage is not None and chunks[-1].usage.prompt_tokens == 3
    assert {c.choices[0].index for c in chunks[:-1]} == {0, 1}
    assert chunks[-1].usage.completion_tokens == sum(c.choices[0].logprobs is not None for c in chunks[:-1])
    answer = client.completions.create(model="tiny", prompt=[[1, 2], [5]], max_tokens=4, logprobs=2)
    assert [c.index for c in answer.choices] == [0, 1]
    for choice in answer.choices:
        logprobs = choice.logprobs
        assert logprobs is not None and logprobs.tokens and logprobs.token_logprobs and logprobs.top_logprobs
        assert len(logprobs.tokens) == len(logprobs.token_logprobs) == len(logprobs.top_logprobs)
        assert logprobs.text_offset is not None and logprobs.text_offset[0] == 0
        for token, logprob, top in zip(logprobs.tokens, logprobs.token_logprobs, logprobs.top_logprobs, strict=True):
            assert top[token] == logprob
        parts = [c.choices[0] for c in chunks[:-1] if c.choices[0].index == choice.index]
        told = [part.logprobs for part in parts if part.logprobs is not None]
        for field in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
            assert [value for part in told for value in getattr(part, field)] == getattr(logprobs, field)
        starts = itertools.accumulate((len(part.text) for part in parts), initial=0)
        assert logprobs.text_offset == list(starts)[: len(told)] and logprobs.text_offset[-1] > 0


def test_usage_counts_a_prompt_once_however_many_answers_it_has(server: Server, client: openai.OpenAI) -> None:
    prompts = [[t % 250 for t in range(41)], [7] * 20]
    for cached in (0, 40 + 16):
        answer = client.completions.create(model="tiny", prompt=prompts, n=3, max_tokens=5, logprobs=0, temperature=0)
        usage = answer.usage
        assert usage is not None and usage.prompt_tokens == 61 and usage.total_tokens == 61 + usage.completion_tokens
        assert [c.index for c in answer.choices] == list(range(6))
        assert [c.text for c in answer.choices] == [
            text_of(continuation(prompt, 5, frozenset({3}))) for prompt in prompts for _ in range(3)
        ]
        assert usage.completion_tokens == sum(len(c.logprobs.tokens or ()) for c in answer.choices if c.logprobs)
        assert usage.prompt_tokens_details is not None and usage.prompt_tokens_details.cached_tokens == cached
        until_idle(server)


def test_stop_strings(client: openai.OpenAI) -> None:
    whole = text_of(continuation([9, 9], 40, frozenset({3})))
    stop = whole[5:8]
    answer = client.completions.create(model="tiny", prompt=[9, 9], max_tokens=40, stop=[stop, "never in it"])
    assert answer.choices[0].text == whole[: whole.index(stop)]
    assert answer.choices[0].finish_reason == "stop"


def schema_format(schema: dict[str, object]) -> dict[str, object]:
    return {"type": "json_schema", "json_schema": {"name": "test", "schema": schema}}


BAD = [
    ({"prompt": ""}, "prompt", "must not be empty"),
    ({"prompt": []}, "prompt", "1 to 128 prompts"),
    ({"prompt": [[]]}, "prompt", "must not be empty"),
    ({"prompt": [["a"]]}, "prompt[0][0]", "integer"),
    ({"prompt": [True]}, "prompt[0]", "got true"),
    ({"prompt": [259]}, "prompt", "token id 259 is not in the vocabulary (0 to 258)"),
    ({"prompt": [-1]}, "prompt[0]", "greater than or equal to 0"),
    ({"prompt": [2**70]}, "prompt[0]", "less than 2147483648"),
    ({"prompt": [1] * MAX_LEN}, "prompt", "maximum context length is 600 tokens"),
    ({"max_tokens": MAX_LEN}, "prompt", "maximum context length is 600 tokens"),
    ({"max_tokens": 0}, "max_tokens", "at least 1 unless echo"),
    ({"max_tokens": -1, "echo": True}, "max_tokens", "greater than or equal to 0"),
    ({"max_tokens": "5"}, "max_tokens", "valid integer"),
    ({"temperature": 2.5}, "temperature", "less than or equal to 2"),
    ({"temperature": -0.1}, "temperature", "greater than or equal to 0"),
    ({"top_p": 0}, "top_p", "greater than 0"),
    ({"top_k": -2}, "top_k", "greater than or equal to -1"),
    ({"seed": 2**64}, "seed", "less than"),
    ({"logprobs": 21}, "logprobs", "less than or equal to 20"),
    ({"stop": [""]}, "stop[0]", "at least 1 character"),
    ({"stop": ["a"] * 65}, "stop", "at most 64 items"),
    ({"n": 129}, "n", "less than or equal to 128"),
    ({"n": 0}, "n", "greater than or equal to 1"),
    ({"n": 8, "prompt": ["a"] * 17}, "prompt", "1 to 16 prompts are allowed with n=8"),
    ({"best_of": 3}, "best_of", "must be 1"),
    ({"best_of": 1, "n": 2}, "best_of", "must not be less than n"),
    ({"min_p": 1.5}, "min_p", "less than or equal to 1"),
    ({"presence_penalty": 2.5}, "presence_penalty", "less than or equal to 2"),
    ({"frequency_penalty": -2.5}, "frequency_penalty", "greater than or equal to -2"),
    ({"repetition_penalty": 0}, "repetition_penalty", "greater than or equal to 0.0001"),
    ({"repetition_penalty": 5e-324}, "repetition_penalty", "greater than or equal to 0.0001"),
    ({"logit_bias": {"259": 1}}, "logit_bias", "token id 259 is not in the vocabulary"),
    ({"logit_bias": {"4294967301": 1}}, "logit_bias", "token id 4294967301 is not in the vocabulary"),
    ({"logit_bias": {"-1": 1}}, "logit_bias.-1", "match pattern"),
    ({"logit_bias": {"5": 100.5}}, "logit_bias.5", "less than or equal to 100"),
    ({"logit_bias": dict.fromkeys(map(str, range(1025)), 1)}, "logit_bias", "at most 1024 entries, not 1025"),
    ({"stop_token_ids": [259]}, "stop_token_ids", "token id 259 is not in the vocabulary"),
    ({"stop_token_ids": [-1]}, "stop_token_ids[0]", "greater than or equal to 0"),
    ({"min_tokens": 17}, "min_tokens", "must not exceed max_tokens (16), got 17"),
    ({"min_tokens": MAX_LEN, "max_tokens": None}, "min_tokens", "exceed the model's maximum context length of 600"),
    ({"prompt_logprobs": 21}, "prompt_logprobs", "less than or equal to 20"),
    ({"prompt_logprobs": 1, "stream": True}, "prompt_logprobs", "is not supported with stream=true"),
    ({"stop": "a" * 1025}, "stop", "at most 1024 characters"),
    ({"cache_salt": "a" * 257}, "cache_salt", "at most 256 characters"),
    ({"suffix": "b"}, "suffix", "not a field of this API"),
    ({"response_format": {"type": "xml"}}, "response_format.type", "json_schema"),
    ({"response_format": {"type": "json_schema"}}, "response_format.json_schema", "required"),
    (
        {"response_format": schema_format({"type": "foo"})},
        "response_format.json_schema.schema",
        "type: must be null, boolean,",
    ),
    (
        {"response_format": schema_format({"$ref": "http://localhost/x"})},
        "response_format.json_schema.schema",
        "another document is not followed",
    ),
    (
        {"response_format": schema_format({"type": "string", "pattern": "(a"})},
        "response_format.json_schema.schema",
        "unclosed group",
    ),
    (
        {"response_format": schema_format({"enum": ["a" * 70_000]})},
        "response_format.json_schema.schema",
        "the limit is 65536",
    ),
    ({"stream_options": {"include_usage": True}}, "stream_options", "requires stream=true"),
    ({"model": 5}, "model", "valid string"),
]


@pytest.mark.parametrize(("change", "param", "message"), BAD, ids=[json.dumps(change)[:40] for change, _, _ in BAD])
def test_bad_requests(server: Server, change: dict[str, object], param: str | None, message: str) -> None:
    answer = httpx.post(f"{server.url}/v1/completions", json={"model": "tiny", "prompt": "a", **change})
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error" and error["param"] == param
    assert message in error["message"]
    until_idle(server)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"null",
        b"[]",
        b'"x"',
        b'{"model": "tiny", "prompt": "a", "temperature": NaN}',
        b'{"model": "tiny", "prompt": "\\ud800"}',
        b'{"model": "\\ud800", "prompt": "a"}',
        b"[" * 100_000,
        b'{"model": "tiny", "prompt": "a", "seed": ' + b"9" * 5000 + b"}",
        b"\xff\xfe",
    ],
)
def test_bodies_that_are_no_request(server: Server, body: bytes) -> None:
    headers = {"content-type": "application/json"}
    answer = httpx.post(f"{server.url}/v1/completions", content=body, headers=headers)
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["message"]


_MANY = 10_000
_USER = {"role": "user", "content": "a"}


@pytest.mark.parametrize(
    ("form", "body"),
    [
        (CompletionRequest, {"prompt": [-1] * _MANY}),
        (CompletionRequest, {"prompt": [[-1] * _MANY]}),
        (CompletionRequest, {"prompt": "a"} | {f"x{i}": 0 for i in range(_MANY)}),
        (CompletionRequest, {"prompt": "a", "logit_bias": {f"x{i}": 0 for i in range(_MANY)}}),
        (CompletionRequest, {"prompt": "a", "stop": [0] * _MANY, "stop_token_ids": [-1] * _MANY}),
        (ChatRequest, {"messages": [{}] * _MANY}),
        (ChatRequest, {"messages": [_USER | {"content": [{}] * _MANY}]}),
        (ChatRequest, {"messages": [_USER | {f"x{i}": 0 for i in range(_MANY)}]}),
        (TokenizeRequest, {"messages": [{}] * _MANY}),
        (DetokenizeRequest, {"tokens": [-1] * _MANY}),
    ],
)
def test_a_body_full_of_mistakes_is_refused_for_few_of_them(form: type[RequestBody], body: dict[str, Any]) -> None:
    """Each takes a kilobyte and some microseconds: 16 MiB of them took all memory, on the event loop."""
    with pytest.raises(ValidationError) as refused:
        form.model_validate({"model": "tiny", **body})
    assert 1 <= refused.value.error_count() <= 10


@pytest.mark.parametrize(
    ("fields", "scores", "param"),
    [
        ({"prompt_logprobs": 20}, 21, "prompt_logprobs"),
        ({"echo": True, "logprobs": 1, "n": 2}, 4, "logprobs"),
        ({"echo": True, "logprobs": 0, "prompt_logprobs": 0}, 2, "prompt_logprobs"),
        ({"logprobs": 20}, 0, None),
        ({"echo": True, "max_tokens": 0}, 0, None),
    ],
)
def test_answers_with_too_many_scores_are_refused(
    server: Server, monkeypatch: pytest.MonkeyPatch, fields: dict[str, Any], scores: int, param: str | None
) -> None:
    body = {"model": "tiny", "prompt": [[5] * 30, [6] * 20], "max_tokens": 1, **fields}

    def post(most: int) -> httpx.Response:
        monkeypatch.setattr(preprocessing, "MAX_PROMPT_LOGPROBS", most)
        return httpx.post(f"{server.url}/v1/completions", json=body)

    assert post(50 * scores).status_code == 200
    if scores:
        refused = post(50 * scores - 1)
        assert refused.status_code == 400
        assert refused.json()["error"]["param"] == param
        assert f"would contain {50 * scores} prompt log-probabilities" in refused.json()["error"]["message"]


def test_other_errors(server: Server, client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as unknown:
        client.completions.create(model="gpt-4", prompt="a")
    assert unknown.value.code == "model_not_found"
    assert client.models.retrieve("tiny").id == "tiny"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other")
    for method, path, status in (("GET", "/nothing", 404), ("GET", "/v1/completions", 405)):
        answer = httpx.request(method, server.url + path)
        assert answer.status_code == status and answer.json()["error"]["message"]


def test_a_bad_request_disturbs_no_other(client: openai.OpenAI) -> None:
    def good(n: int) -> bool:
        answer = client.completions.create(model="tiny", prompt=[n, 4, 4], max_tokens=40).choices[0].text
        return answer == text_of(continuation([n, 4, 4], 40, frozenset({3})))

    def bad(n: int) -> bool:
        with pytest.raises(openai.BadRequestError):
            client.completions.create(model="tiny", prompt=[n, 999], max_tokens=40)
        return True

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(lambda n: good(n) if n % 2 else bad(n), range(40)))


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_away_frees_its_pages(server: Server, stream: bool) -> None:
    server.model.gate = threading.Semaphore(0)
    try:
        body = {"model": "tiny", "prompt": [1, 2, 3], "max_tokens": 500, "ignore_eos": True, "stream": stream}
        before = server.model.steps
        server.model.gate.release(3)
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{server.url}/v1/completions", json=body, timeout=0.5)

        def idle() -> bool:
            """After one more step: when the server notices is its own affair."""
            assert server.model.gate is not None
            server.model.gate.release()
            time.sleep(0.02)
            return is_idle(server.engine)

        until(idle)
        assert server.model.steps - before < 250, "it did not go on to its end"
    finally:
        server.model.gate.release(10_000)
        server.model.gate = None


def test_a_failed_step_is_a_500_and_the_server_goes_on(server: Server, client: openai.OpenAI) -> None:
    until_idle(server)  # no step in flight that would fail in place of this request's
    server.model.fail_next = 1
    with pytest.raises(openai.InternalServerError) as failed:
        client.completions.create(model="tiny", prompt=[1], max_tokens=5)
    assert "step" in failed.value.message
    assert client.completions.create(model="tiny", prompt=[1], max_tokens=5).choices[0].text
    assert httpx.get(f"{server.url}/health").status_code == 200
    until_idle(server)


def test_drafts_change_no_answer_and_are_counted() -> None:
    server = Server(draft_tokens=3)
    server.start()
    try:
        none_yet = {"drafted": 0, "accepted": 0, "acceptance_rate": 0.0}
        assert httpx.get(f"{server.url}/health").json() == {"status": "ok", "speculation": none_yet}
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
        answer = client.completions.create(model="tiny", prompt=[1, 2], max_tokens=40, logprobs=1)
        want = continuation([1, 2], 40, frozenset({3}))
        assert answer.choices[0].text == text_of(want)
        assert answer.choices[0].logprobs is not None and len(answer.choices[0].logprobs.tokens or []) == len(want)
        counts = httpx.get(f"{server.url}/health").json()["speculation"]
        assert 0 < counts["accepted"] < counts["drafted"]
        assert counts["acceptance_rate"] == counts["accepted"] / counts["drafted"]
    finally:
        server.stop()


def test_health_tells_that_the_engine_is_dead() -> None:
    server = Server()
    server.start()
    try:
        assert httpx.get(f"{server.url}/health").json() == {"status": "ok"}
        server.engine.stop(5)
        assert httpx.get(f"{server.url}/health").status_code == 503
        body = {"model": "tiny", "prompt": "a"}
        assert httpx.post(f"{server.url}/v1/completions", json=body).status_code == 503
    finally:
        server.stop()


def test_openapi_and_version(server: Server) -> None:
    paths = httpx.get(f"{server.url}/openapi.json").json()["paths"]
    assert {"/v1/completions", "/v1/models", "/health", "/version"} <= set(paths)
    assert httpx.get(f"{server.url}/version").json()["version"]


def test_a_full_queue_is_a_503_that_says_when_to_come_again(
    server: Server, client: openai.OpenAI, monkeypatch: pytest.MonkeyPatch
) -> None:
    body = {"model": "tiny", "prompt": ["a"] * 17, "n": 4}
    never = httpx.post(f"{server.url}/v1/completions", json=body)
    assert never.status_code == 400 and never.json()["error"]["param"] == "n", "more than the queue ever holds"
    with monkeypatch.context() as patch:
        patch.setattr(server.engine, "_num_unfinished", 1000)
        answer = httpx.post(f"{server.url}/v1/completions", json=body | {"prompt": "a", "n": 1})
    assert answer.status_code == 503 and answer.json()["error"]["code"] == "queue_full"
    assert int(answer.headers["retry-after"]) >= 1
    assert client.completions.create(model="tiny", prompt="a").choices[0].text, "none was taken"
    until_idle(server)


def test_a_request_that_takes_too_long(monkeypatch: pytest.MonkeyPatch) -> None:
    server = Server(request_timeout=0.2)
    server.start()
    step = server.model.step

    def slow(work: Any) -> Any:
        time.sleep(0.3)
        return step(work)

    monkeypatch.setattr(server.model, "step", slow)
    try:
        answer = httpx.post(f"{server.url}/v1/completions", json={"model": "tiny", "prompt": "a"})
        assert answer.status_code == 408 and answer.json()["error"]["code"] == "request_timeout"
    finally:
        server.stop()


class _Held:
    """Holds up whoever compiles a grammar, until released."""

    def __init__(self, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
        self.entered = threading.Semaphore(0)
        self.release = threading.Event()
        self.compiled = 0
        real = server.served.grammars.compile

        def compile(constraint: Any) -> Any:
            self.entered.release()
            assert self.release.wait(60)
            self.compiled += 1
            return real(constraint)

        monkeypatch.setattr(server.served.grammars, "compile", compile)


GUIDED = {"model": "tiny", "prompt": "a", "guided_choice": ["x"]}


def test_grammars_hold_up_only_requests_with_a_grammar(
    server: Server, client: openai.OpenAI, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More of them than there are threads in asyncio's pool. One whose client leaves is never compiled."""
    held, url = _Held(server, monkeypatch), f"{server.url}/v1/completions"
    monkeypatch.setattr(server.served.grammar_workers, "_max_queued", 38)
    with ThreadPoolExecutor(40) as clients:
        gone = httpx.Timeout(60, read=0.3)
        waiting = [clients.submit(httpx.post, url, json=GUIDED, timeout=60) for _ in range(8)]
        for _ in range(2):
            assert held.entered.acquire(timeout=30)
        until(lambda: server.served.grammar_workers._unfinished == 8)
        left = [clients.submit(httpx.post, url, json=GUIDED, timeout=gone) for _ in range(32)]
        for each in left:
            assert isinstance(each.exception(), httpx.ReadTimeout)
        assert client.completions.create(model="tiny", prompt="a").choices[0].text, "not held up"
        until(lambda: server.served.grammar_workers._unfinished == 8)
        monkeypatch.setattr(server.served.grammar_workers, "_max_queued", 6)
        full = httpx.post(url, json=GUIDED)
        assert full.status_code == 503 and full.json()["error"]["code"] == "queue_full"
        assert "6 requests wait for their grammars" in full.json()["error"]["message"] and full.headers["retry-after"]
        held.release.set()
        assert [each.result().json()["choices"][0]["text"] for each in waiting] == ["x"] * 8
    assert held.compiled == 8
    until_idle(server)


def test_the_time_limit_counts_from_the_arrival(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiling the grammar is part of it."""
    server = Server(request_timeout=0.3)
    server.start()
    held = _Held(server, monkeypatch)
    try:
        answer = httpx.post(f"{server.url}/v1/completions", json=GUIDED)
        assert answer.status_code == 408 and answer.json()["error"]["code"] == "request_timeout"
        assert "within 0.3 s: its preparation" in answer.json()["error"]["message"]
        assert held.compiled == 0, "it was told before"
        held.release.set()
        until(lambda: server.served.grammar_workers._unfinished == 0)
        assert httpx.post(f"{server.url}/v1/completions", json=GUIDED).json()["choices"][0]["text"] == "x"
        until_idle(server)
    finally:
        held.release.set()
        server.stop()


def test_a_request_that_waits_too_long() -> None:
    """It comes while a step runs that takes longer."""
    server = Server(queue_timeout=0.4)
    server.start()
    server.model.gate = gate = threading.Semaphore(1)
    try:
        body = {"model": "tiny", "prompt": [1, 2], "max_tokens": 300, "ignore_eos": True}
        with ThreadPoolExecutor(2) as pool:
            runs = pool.submit(httpx.post, f"{server.url}/v1/completions", json=body, timeout=60)
            until(lambda: server.engine.status().steps == 1)
            waits = pool.submit(httpx.post, f"{server.url}/v1/completions", json=body, timeout=60)
            until(lambda: server.engine.status().waiting == 1)
            time.sleep(0.45)
            gate.release(10_000)
            answer = waits.result()
            assert answer.status_code == 503 and answer.json()["error"]["code"] == "queue_timeout"
            assert runs.result().status_code == 200
    finally:
        gate.release(10_000)
        server.stop()


def test_a_stream_that_fails_says_so_and_ends(server: Server) -> None:
    until_idle(server)
    server.model.fail_next = 1
    body = {"model": "tiny", "prompt": [9, 9, 7], "stream": True}
    answer = httpx.post(f"{server.url}/v1/completions", json=body)
    assert answer.status_code == 200
    *_, error, done = [line for line in answer.text.split("\n") if line]
    assert json.loads(error.removeprefix("data: "))["error"]["code"] == "step_failed" and done == "data: [DONE]"


def test_openapi_says_what_is_answered(server: Server) -> None:
    spec = httpx.get(f"{server.url}/openapi.json").json()
    assert {"/v1/chat/completions", "/tokenize", "/detokenize", "/tokenizer_info"} <= set(spec["paths"])
    for path, operations in spec["paths"].items():
        for operation in operations.values():
            responses = operation["responses"]
            assert "422" not in responses, f"{path}: never sent"
            assert {"200", "400", "503", "default"} <= set(responses)
    streamed = spec["paths"]["/v1/chat/completions"]["post"]["responses"]["200"]["content"]
    assert set(streamed) == {"application/json", "text/event-stream"}
    for name in ("CompletionRequest", "ChatRequest", "TokenizeRequest", "Message"):
        assert spec["components"]["schemas"][name]["additionalProperties"] is False
    stop = spec["components"]["schemas"]["CompletionRequest"]["properties"]["stop"]["anyOf"]
    assert stop[0]["maxLength"] == 1024 and stop[1]["maxItems"] == 64
