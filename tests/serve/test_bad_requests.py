"""Requests that are refused: the status, the field and the message; and the server goes on."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import openai
import pytest
from pydantic import ValidationError

from jax_mla_cp.serve import preprocessing
from jax_mla_cp.serve.schemas.base import RequestBody
from jax_mla_cp.serve.schemas.chat import ChatRequest
from jax_mla_cp.serve.schemas.completions import CompletionRequest
from jax_mla_cp.serve.tokens import DetokenizeRequest, TokenizeRequest
from tests.helpers.page_server import MAX_LEN, PageServer, text_of, until_idle
from tests.helpers.standin import continuation


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
def test_bad_requests(page_server: PageServer, change: dict[str, object], param: str | None, message: str) -> None:
    answer = httpx.post(f"{page_server.url}/v1/completions", json={"model": "tiny", "prompt": "a", **change})
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error" and error["param"] == param
    assert message in error["message"]
    until_idle(page_server)


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
def test_bodies_that_are_no_request(page_server: PageServer, body: bytes) -> None:
    headers = {"content-type": "application/json"}
    answer = httpx.post(f"{page_server.url}/v1/completions", content=body, headers=headers)
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
    page_server: PageServer, monkeypatch: pytest.MonkeyPatch, fields: dict[str, Any], scores: int, param: str | None
) -> None:
    body = {"model": "tiny", "prompt": [[5] * 30, [6] * 20], "max_tokens": 1, **fields}

    def post(most: int) -> httpx.Response:
        monkeypatch.setattr(preprocessing, "MAX_PROMPT_LOGPROBS", most)
        return httpx.post(f"{page_server.url}/v1/completions", json=body)

    assert post(50 * scores).status_code == 200
    if scores:
        refused = post(50 * scores - 1)
        assert refused.status_code == 400
        assert refused.json()["error"]["param"] == param
        assert f"would contain {50 * scores} prompt log-probabilities" in refused.json()["error"]["message"]


def test_other_errors(page_server: PageServer, client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as unknown:
        client.completions.create(model="gpt-4", prompt="a")
    assert unknown.value.code == "model_not_found"
    assert client.models.retrieve("tiny").id == "tiny"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other")
    for method, path, status in (("GET", "/nothing", 404), ("GET", "/v1/completions", 405)):
        answer = httpx.request(method, page_server.url + path)
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
