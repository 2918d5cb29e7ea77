"""The parts of a chat request that reach the template: roles, calls, tools, variables; and the place where the prompt ends."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from jax_mla_cp.tokenizer import ChatTemplate, Tokenizer
from tests.helpers.scripted_model import Script, serving_script

USER = {"role": "user", "content": "Hi"}
CALL = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"a":1}'}}
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with serving_script(Script(), tool_parser="deepseek_v31") as address:
        yield address


def prompt(url: str, *messages: dict[str, Any], **fields: Any) -> str:
    """The rendered conversation."""
    answer = httpx.post(f"{url}/tokenize", json={"messages": list(messages), **fields})
    assert answer.status_code == 200, answer.text
    return bytes(answer.json()["tokens"]).decode()


def test_messages(url: str) -> None:
    assert prompt(url, {"role": "developer", "content": "Be terse."}, USER) == "Be terse.Hi\x02"
    parts = [{"type": "text", "text": "a", "cache_control": {"type": "ephemeral"}}, {"type": "text", "text": "b"}]
    assert prompt(url, {"role": "user", "content": parts, "name": "Ann"}) == "ab\x02"
    called = {"role": "assistant", "content": None, "tool_calls": [CALL]}
    result = {"role": "tool", "tool_call_id": "c1", "content": "42"}
    assert prompt(url, USER, called, result) == 'Hi[f {"a":1}]42=c1\x02'


def test_tools(url: str) -> None:
    shown = '[{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]'
    assert prompt(url, USER, tools=TOOLS) == f"{shown}Hi\x02"
    assert prompt(url, USER, tools=[]) == "Hi\x02"


def test_variables(url: str) -> None:
    assert prompt(url, USER, chat_template_kwargs={"effort": True, "reasoning_effort": "low"}) == "Hilow\x02"
    assert prompt(url, USER, chat_template_kwargs={"thinking": False, "unknown": [1], "self": 1}) == "Hi\x02"
    for name in ("tools", "add_generation_prompt", "tokenize", "chat_template"):
        answer = httpx.post(f"{url}/tokenize", json={"messages": [USER], "chat_template_kwargs": {name: 1}})
        assert answer.status_code == 400
        assert answer.json()["error"]["param"] == f"chat_template_kwargs.{name}"


def test_the_prompts_end(url: str) -> None:
    started = {"role": "assistant", "content": "A page is "}
    assert prompt(url, USER, add_generation_prompt=False) == "Hi"
    assert prompt(url, USER, started, continue_final_message=True) == "HiA page is "
    short = {"role": "assistant", "content": "i"}
    assert prompt(url, short, USER, short, continue_final_message=True) == "iHii", "no text after it is taken for it"
    assert prompt(url, USER, started) == "HiA page is \x02"
    body = {"model": "tiny", "messages": [USER, started], "max_tokens": 3}
    usage = [
        httpx.post(f"{url}/v1/chat/completions", json=body | fields).json()["usage"]["prompt_tokens"]
        for fields in (
            {},
            {"continue_final_message": True, "add_generation_prompt": False},
            {"truncate_prompt_tokens": 4},
        )
    ]
    assert usage == [13, 12, 4]
    empty = {**body, "messages": [USER, {"role": "assistant", "content": ""}], "continue_final_message": True}
    assert httpx.post(f"{url}/v1/chat/completions", json=empty).json()["usage"]["prompt_tokens"] == 2


@pytest.mark.parametrize(
    "last", [USER, {"role": "assistant", "content": "A", "tool_calls": [CALL]}], ids=["user", "calls"]
)
@pytest.mark.parametrize("path", ["/tokenize", "/v1/chat/completions"])
def test_final_messages_that_can_not_be_continued(url: str, path: str, last: dict[str, Any]) -> None:
    body = {"model": "tiny", "messages": [USER, last], "continue_final_message": True}
    answer = httpx.post(url + path, json=body)
    assert answer.status_code == 400 and answer.json()["error"]["param"] == "continue_final_message"
    assert "must be an assistant's, without tool calls" in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    "fields", [{"tools": TOOLS}, {"chat_template_kwargs": {"a": 1}}, {"continue_final_message": True}]
)
def test_a_prompt_takes_no_fields_of_messages(url: str, fields: dict[str, Any]) -> None:
    answer = httpx.post(f"{url}/tokenize", json={"prompt": "a", **fields})
    assert answer.status_code == 400 and answer.json()["error"]["param"] == next(iter(fields))


def test_a_final_message_that_the_template_drops() -> None:
    with serving_script(Script(), "{{ messages[0].content }}") as url:
        started = {"role": "assistant", "content": "A"}
        body = {"model": "tiny", "messages": [USER, started], "continue_final_message": True}
        answer = httpx.post(f"{url}/v1/chat/completions", json=body)
        assert answer.status_code == 400 and answer.json()["error"]["param"] == "continue_final_message"


def test_reasoning_effort_is_the_templates(url: str) -> None:
    body = {"model": "tiny", "messages": [USER], "max_tokens": 1, "reasoning_effort": "low"}
    answer = httpx.post(f"{url}/v1/chat/completions", json=body).json()
    assert answer["usage"]["prompt_tokens"] == len("Hilow\x02")


POOR = "{% for m in messages %}{{ m.content }}{% endfor %}"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"messages": [USER, {"role": "tool", "content": "42"}]}, "messages[1].role"),
        ({"messages": [USER, {"role": "assistant", "tool_calls": [CALL]}]}, "messages[1].tool_calls"),
        ({"messages": [USER], "tools": TOOLS}, "tools"),
    ],
    ids=["tool", "calls", "tools"],
)
def test_what_a_template_would_drop_is_refused(fields: dict[str, Any], param: str) -> None:
    with serving_script(Script(), POOR, tool_parser="deepseek_v31") as url:
        answer = httpx.post(f"{url}/v1/chat/completions", json={"model": "tiny", **fields})
        assert answer.status_code == 400 and answer.json()["error"]["param"] == param, answer.text
        without = {"model": "tiny", "messages": [USER], "tools": TOOLS, "tool_choice": "none", "max_tokens": 1}
        assert httpx.post(f"{url}/v1/chat/completions", json=without).status_code == 200


def test_no_variable_is_taken_for_an_argument(url: str) -> None:
    """Variables become keyword arguments on their way to the template."""
    for function in (Tokenizer.encode_chat, ChatTemplate.render):
        for name, parameter in inspect.signature(function).parameters.items():
            if parameter.kind is inspect.Parameter.KEYWORD_ONLY:
                answer = httpx.post(f"{url}/tokenize", json={"messages": [USER], "chat_template_kwargs": {name: 1}})
                assert answer.status_code == 400, name
