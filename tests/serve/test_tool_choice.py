"""Tool calls through chat completions, whole and streamed, with a model that says what a test wants."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import openai
import pytest

from jax_mla_cp.serve.structured_output.pattern_budget import MAX_PATTERN
from tests.helpers.in_process import client_of
from tests.helpers.scripted_model import Script, serving_script

PARAMETERS = {
    "type": "object",
    "properties": {"a": {"type": "integer"}},
    "required": ["a"],
    "additionalProperties": False,
}
TOOLS: list[Any] = [
    {"type": "function", "function": {"name": name, "parameters": PARAMETERS}} for name in ("add", "sub")
]
BEGIN, END = "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"


def call(name: str, arguments: str) -> str:
    return f"<｜tool▁call▁begin｜>{name}<｜tool▁sep｜>{arguments}<｜tool▁call▁end｜>"


ONE = BEGIN + call("add", '{"a": 1}') + END
TWO = BEGIN + call("add", '{"a": 1}') + call("sub", '{"a": 2}') + END


@pytest.fixture(scope="module")
def model() -> Script:
    return Script(pages=1000, max_running=8, prefill_chunk=64)


@pytest.fixture(scope="module")
def client(model: Script) -> Iterator[openai.OpenAI]:
    with serving_script(model, max_model_len=1200, tool_parser="deepseek_v31") as url:
        yield client_of(url)


def ask(client: openai.OpenAI, content: str = "say", **fields: Any) -> dict[str, Any]:
    """The message, with `finish_reason` in it; the same whether streamed or not."""
    arguments: Any = {"model": "tiny", "messages": [{"role": "user", "content": content}], "tools": TOOLS, **fields}
    choice = client.chat.completions.create(**arguments).choices[0]
    whole = {"finish_reason": choice.finish_reason, **choice.message.to_dict()}
    assert whole.pop("role") == "assistant"
    streamed: dict[str, Any] = {"content": "", "reasoning_content": "", "tool_calls": []}
    for chunk in client.chat.completions.create(**arguments, stream=True):
        delta = chunk.choices[0].delta.to_dict()
        for name in ("content", "reasoning_content"):
            streamed[name] += delta.get(name) or ""
        for part in delta.get("tool_calls", []):
            if part["index"] == len(streamed["tool_calls"]):
                assert part["id"] and part["type"] == "function" and part["function"]["name"]
                streamed["tool_calls"].append({"function": {"name": part["function"]["name"], "arguments": ""}})
            else:
                assert part.keys() == {"index", "function"} and part["function"].keys() == {"arguments"}
            streamed["tool_calls"][part["index"]]["function"]["arguments"] += part["function"]["arguments"]
        streamed["finish_reason"] = chunk.choices[0].finish_reason
    for each in whole.get("tool_calls", []):
        assert each.pop("id").startswith("call_") and each.pop("type") == "function"
    empty: dict[str, Any] = {"content": "", "reasoning_content": "", "tool_calls": []}
    assert {name: whole.get(name) or empty.get(name) for name in streamed} == streamed
    return whole


def functions(message: dict[str, Any]) -> list[tuple[str, str]]:
    return [(each["function"]["name"], each["function"]["arguments"]) for each in message.get("tool_calls", [])]


def test_a_call(model: Script, client: openai.OpenAI) -> None:
    model.script = ONE
    message = ask(client)
    assert functions(message) == [("add", '{"a": 1}')]
    assert message["content"] is None and message["finish_reason"] == "tool_calls"


def test_text_before_calls(model: Script, client: openai.OpenAI) -> None:
    model.script = f"Let me see.{TWO}"
    message = ask(client)
    assert functions(message) == [("add", '{"a": 1}'), ("sub", '{"a": 2}')]
    assert message["content"] == "Let me see." and message["finish_reason"] == "tool_calls"
    assert functions(ask(client, parallel_tool_calls=False)) == [("add", '{"a": 1}')]


@pytest.mark.parametrize("script", ["No call.", f"{BEGIN} is a marker", "a < b", BEGIN[:-1]])
def test_text_that_is_no_call(model: Script, client: openai.OpenAI, script: str) -> None:
    model.script = script
    message = ask(client)
    assert message["content"] == script and message["finish_reason"] == "stop" and not functions(message)


def test_no_tools_no_calls(model: Script, client: openai.OpenAI) -> None:
    model.script = ONE
    for fields in ({"tool_choice": "none"}, {"tools": []}, {"tools": None}):
        message = ask(client, **fields)
        assert message["content"] == ONE and message["finish_reason"] == "stop"


def test_a_call_inside_of_thoughts_ends_them(model: Script, client: openai.OpenAI) -> None:
    """Models forget </think> before a call."""
    for end in ("", "</think>", "</think>\n\n"):
        model.script = f"Hm, I add.{end}{ONE}"
        message = ask(client, "open")
        assert message["reasoning_content"] == "Hm, I add." and functions(message) == [("add", '{"a": 1}')]
        assert message["content"] is None and message["finish_reason"] == "tool_calls"
    assert ask(client, "open", tool_choice="none")["reasoning_content"] == "Hm, I add."


def test_a_call_that_is_cut(model: Script, client: openai.OpenAI) -> None:
    model.script = ONE
    message = ask(client, max_tokens=len(ONE.encode()) - len(f"1}}<｜tool▁call▁end｜>{END}".encode()))
    assert functions(message) == [("add", '{"a":')] and message["finish_reason"] == "length"


def test_a_second_call_that_does_not_count_may_be_cut(model: Script, client: openai.OpenAI) -> None:
    model.script = BEGIN + call("add", '{"a": 1}') + "<｜tool▁call▁begin｜>sub<｜tool▁sep｜>{"
    assert ask(client)["finish_reason"] == "stop"
    message = ask(client, parallel_tool_calls=False)
    assert functions(message) == [("add", '{"a": 1}')] and message["finish_reason"] == "tool_calls"


@pytest.mark.parametrize("script", ["I'd rather not.", ONE, TWO])
def test_required_calls(model: Script, client: openai.OpenAI, script: str) -> None:
    model.script = script
    message = ask(client, tool_choice="required", max_tokens=400)
    called = functions(message)
    assert called and message["finish_reason"] == "tool_calls", message
    for name, arguments in called:
        assert name in ("add", "sub") and isinstance(json.loads(arguments)["a"], int)
    if script == TWO:
        assert [name for name, _ in called] == ["add", "sub"]


def test_a_named_call(model: Script, client: openai.OpenAI) -> None:
    model.script = ONE
    named = {"type": "function", "function": {"name": "sub"}}
    message = ask(client, tool_choice=named, max_tokens=400)
    ((name, arguments),) = functions(message)
    assert name == "sub" and isinstance(json.loads(arguments)["a"], int) and message["finish_reason"] == "stop"


def test_strict_arguments(model: Script, client: openai.OpenAI) -> None:
    """Only what `strict` asks for is held: the model may still say anything else."""
    wrong = BEGIN + call("add", '{"a": "x"}') + END
    strict = [{"type": "function", "function": {**TOOLS[0]["function"], "strict": True}}]
    model.script = wrong
    assert functions(ask(client)) == [("add", '{"a": "x"}')]
    ((_, arguments),) = functions(ask(client, tools=strict, max_tokens=400))
    assert isinstance(json.loads(arguments)["a"], int)
    model.script = "Just text."
    assert ask(client, tools=strict)["content"] == "Just text."


FORMAT = {
    "type": "json_schema",
    "json_schema": {"name": "x", "schema": {**PARAMETERS, "properties": {"a": {"type": "boolean"}}}},
}


def test_a_format_of_the_answer_leaves_a_place_for_calls(model: Script, client: openai.OpenAI) -> None:
    """As OpenAI's agents send it: tools, and the format of the last answer."""
    model.script = ONE
    called = ask(client, response_format=FORMAT, max_tokens=400)
    assert functions(called) == [("add", '{"a": 1}')] and called["finish_reason"] == "tool_calls"
    model.script = '{"a": true}'
    answered = ask(client, response_format=FORMAT, max_tokens=400)
    assert answered["content"] == '{"a": true}' and answered["finish_reason"] == "stop" and not functions(answered)
    model.script = '{"a": 5}'
    assert isinstance(json.loads(ask(client, response_format=FORMAT, max_tokens=400)["content"])["a"], bool)
    strict = [{"type": "function", "function": {**TOOLS[0]["function"], "strict": True}}]
    model.script = BEGIN + call("add", '{"a": "x"}') + END
    ((_, arguments),) = functions(ask(client, tools=strict, response_format=FORMAT, max_tokens=400))
    assert isinstance(json.loads(arguments)["a"], int)


def test_schemas_that_no_call_can_follow(client: openai.OpenAI) -> None:
    """Found before the grammar is made, or by llguidance: the tool is named, and the place in its schema."""
    for schema, message in (
        ({"type": "object", "properties": {"a": {"type": "wish"}}}, "at /properties/a: type"),
        ({"type": "object", "properties": {"a": {"not": {}}}}, "at /properties/a: `not` can't be enforced"),
        (
            {"type": "object", "properties": {"a": {"minimum": 5, "maximum": 3, "type": "integer"}}, "required": ["a"]},
            "",
        ),
    ):
        bad = {"type": "function", "function": {"name": "f", "parameters": schema}}
        with pytest.raises(openai.BadRequestError) as error:
            ask(client, tools=[TOOLS[0], bad], tool_choice="required")
        path = "tools[1].function.parameters"
        assert error.value.param == path and f"{path}: {message}" in error.value.message


@pytest.fixture(scope="module")
def glm() -> Iterator[openai.OpenAI]:
    model = Script(pages=1000, max_running=2, prefill_chunk=64)
    with serving_script(model, max_model_len=8000, tool_parser="glm47") as url:
        yield client_of(url)


def refusal(client: openai.OpenAI, tools: list[Any]) -> tuple[str | None, str]:
    """The `param` and the message."""
    with pytest.raises(openai.BadRequestError) as error:
        ask(client, tools=tools, tool_choice="required")
    return error.value.param, error.value.message


def with_b(name: str, schema: Any) -> Any:
    parameters = {"type": "object", "properties": {"a": {"type": "integer"}, "b": schema}}
    return {"type": "function", "function": {"name": name, "parameters": parameters}}


LOOK_AHEAD = {"type": "string", "pattern": "^(?=a)a$"}


@pytest.mark.parametrize(
    ("schema", "place", "message"),
    [
        (LOOK_AHEAD, "/properties/b", "look-ahead"),
        ({"type": "array", "items": LOOK_AHEAD}, "/properties/b/items", "look-ahead"),
        # It fits as JSON, but not with what is around a raw string.
        ({"type": "string", "pattern": f"^{'a' * (MAX_PATTERN - 2)}$"}, "/properties/b", "characters long"),
        ({"type": ["string", "integer"], "maximum": 5}, "/properties/b", "a string beside other values"),
    ],
    ids=["string", "items", "long", "mixed"],
)
def test_what_fails_in_the_grammar_names_the_tool_and_the_place(
    glm: openai.OpenAI, schema: Any, place: str, message: str
) -> None:
    param, text = refusal(glm, [*TOOLS, with_b("f", schema), with_b("g", {"type": "string"})])
    assert param == "tools[2].function.parameters" and f"{param}: at {place}: " in text and message in text


def test_schemas_that_are_too_much_together(glm: openai.OpenAI) -> None:
    """The limits are those of all tools: the one that exceeds them is named, or none if each could go alone."""
    long = [with_b(f"f{i}", {"type": "string", "pattern": "a" * 1400}) for i in range(3)]
    param, text = refusal(glm, long)
    assert param == "tools[2].function.parameters" and "too long together" in text
    param, text = refusal(glm, [with_b(f"f{i}", {"type": "string", "pattern": "a" * 1180}) for i in range(3)])
    assert param == "tools" and "too long together" in text
