"""Chat over a model that says what a test wants: thoughts, refusals, templates that refuse."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest

from jax_mla_cp.serve.reasoning import ReasoningParser
from tests.helpers.in_process import client_of
from tests.helpers.scripted_model import VOCAB_SIZE, Script, serving_script


@pytest.fixture(scope="module")
def model() -> Script:
    return Script(pages=400, max_running=8)


@pytest.fixture(scope="module")
def url(model: Script) -> Iterator[str]:
    with serving_script(model) as address:
        yield address


@pytest.fixture(scope="module")
def client(url: str) -> openai.OpenAI:
    return client_of(url)


CASES = [
    ("open", "Hm, 世界\n</think>\n\nYes.", "Hm, 世界\n", "Yes."),
    ("open", "<think>\nAgain</think>a</think>b", "<think>\nAgain", "a</think>b"),
    ("open", "never done </thin", "never done </thin", ""),
    ("say", "<think>Hm</think>Yes.", "Hm", "Yes."),
    ("say", "\n<think>\nHm</think>Yes.", "Hm", "Yes."),
    ("say", "<thinking is hard", None, "<thinking is hard"),
    ("say", "No <think>tags</think>", None, "No <think>tags</think>"),
    ("say", "<th", None, "<th"),
    ("say", " spaces first", None, " spaces first"),
]


@pytest.mark.parametrize(("ask", "script", "thoughts", "content"), CASES)
def test_thoughts(
    model: Script, client: openai.OpenAI, ask: str, script: str, thoughts: str | None, content: str
) -> None:
    model.script = script
    arguments: Any = {"model": "tiny", "messages": [{"role": "user", "content": ask}]}
    message = client.chat.completions.create(**arguments).choices[0].message.to_dict()
    assert (message.get("reasoning_content"), message.get("content") or "") == (thoughts, content)
    deltas = [c.choices[0].delta.to_dict() for c in client.chat.completions.create(**arguments, stream=True)]
    assert "".join(str(delta.get("reasoning_content", "")) for delta in deltas) == (thoughts or "")
    assert "".join(str(delta.get("content", "")) for delta in deltas) == content


@pytest.mark.parametrize("size", [1, 2, 3, 7, 100])
@pytest.mark.parametrize(("ask", "script", "thoughts", "content"), CASES)
def test_thoughts_however_they_are_cut(size: int, ask: str, script: str, thoughts: str | None, content: str) -> None:
    parser = ReasoningParser(in_reasoning=ask == "open")
    parts = [parser.push(script[at : at + size]) for at in range(0, len(script), size)] + [parser.flush()]
    assert "".join(t for t, _ in parts) == (thoughts or "") and "".join(c for _, c in parts) == content


def test_a_completion_keeps_the_tags(model: Script, client: openai.OpenAI) -> None:
    model.script = "<think>Hm</think>Yes."
    answer = client.completions.create(model="tiny", prompt="x\x02", max_tokens=100)
    assert answer.choices[0].text == model.script


BAD: list[tuple[dict[str, Any], str | None, str]] = [
    ({"messages": []}, "messages", "at least 1 item"),
    ({"messages": "hi"}, "messages", "valid list"),
    ({"messages": [{"role": "user"}]}, "messages[0].content", "is required"),
    ({"messages": [{"role": "user", "content": "refuse"}]}, "messages", "no such talk"),
    ({"messages": [{"role": "user", "content": "x" * 700}]}, "messages", "maximum context length is 600 tokens"),
    ({"chat_template": "{{ 1 }}"}, "chat_template", "not a field"),
    ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs.messages", "the server sets this variable"),
    ({"logprobs": 2}, "logprobs", "valid boolean"),
    ({"prompt": "x"}, "prompt", "not a field"),
    ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools", "none of the known formats"),
    ({"thinking_token_budget": 5}, "thinking_token_budget", "are not single tokens"),
    (
        {"messages": [{"role": "user", "content": "open"}], "response_format": {"type": "json_object"}},
        "response_format",
        "can't tell where the answer starts",
    ),
]
"""Requests that a model or template can't serve. tests/serve/test_request_bodies.py has those that no model can."""


@pytest.mark.parametrize(("change", "param", "message"), BAD, ids=[str(change)[:50] for change, _, _ in BAD])
def test_bad_requests(url: str, change: dict[str, Any], param: str | None, message: str) -> None:
    body = {"model": "tiny", "messages": [{"role": "user", "content": "say"}], **change}
    answer = httpx.post(f"{url}/v1/chat/completions", json=body)
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["param"] == param and message in answer.json()["error"]["message"]


def test_another_model_is_not_found(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model="gpt-4", messages=[{"role": "user", "content": "say"}])


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/tokenize", {}),
        ("/tokenize", {"prompt": "a", "messages": [{"role": "user", "content": "a"}]}),
        ("/tokenize", {"messages": [{"role": "user", "content": "refuse"}]}),
        ("/tokenize", {"prompt": "a", "other": 1}),
        ("/detokenize", {"tokens": [VOCAB_SIZE]}),
        ("/detokenize", {"tokens": [-1]}),
        ("/detokenize", {}),
    ],
)
def test_what_can_not_be_tokenized(url: str, path: str, body: dict[str, Any]) -> None:
    answer = httpx.post(url + path, json=body)
    assert answer.status_code == 400 and answer.json()["error"]["message"]


def test_special_tokens_of_a_prompt_are_optional(url: str) -> None:
    def tokens(**body: Any) -> list[int]:
        return httpx.post(f"{url}/tokenize", json=body).json()["tokens"]

    said = tokens(messages=[{"role": "user", "content": "ab"}], add_generation_prompt=False)
    assert said == [*b"ab"] and tokens(prompt="ab", add_special_tokens=False) == [*b"ab"]
    for path, body in (("/tokenize", {"prompt": "a"}), ("/detokenize", {"tokens": [97]})):
        assert httpx.post(url + path, json=body).status_code == 200
        assert httpx.post(url + path, json={**body, "model": "other"}).status_code == 404
