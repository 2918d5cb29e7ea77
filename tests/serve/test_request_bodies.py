"""Request bodies without a server: what asks for nothing, what is taken, and how a refusal names its field."""

from __future__ import annotations

from typing import Any

import pytest
from fastapi.exceptions import RequestValidationError
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from jax_mla_cp.serve.errors import invalid_body
from jax_mla_cp.serve.schemas.base import RequestBody
from jax_mla_cp.serve.schemas.chat import ChatRequest, Message
from jax_mla_cp.serve.schemas.completions import CompletionRequest

CHAT: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": "Hi"}]}
COMPLETION: dict[str, Any] = {"model": "m", "prompt": "Hi"}
FUNCTION: dict[str, Any] = {"type": "function", "function": {"name": "f", "parameters": {}}}
CALL: dict[str, Any] = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}


def refusal(model: type[RequestBody], body: dict[str, Any]) -> tuple[str | None, str]:
    """The error's param and message."""
    with pytest.raises(ValidationError) as caught:
        model.model_validate(body)
    errors = [{**error, "loc": ("body", *error["loc"])} for error in caught.value.errors()]
    error = invalid_body(RequestValidationError(errors, body=body))["error"]
    return error["param"], error["message"]


def chat(*messages: dict[str, Any], **fields: Any) -> dict[str, Any]:
    return {**CHAT, "messages": [*CHAT["messages"], *messages], **fields}


@pytest.mark.parametrize("model", [ChatRequest, CompletionRequest])
@pytest.mark.parametrize("nothing", [None, [], {}, ""], ids=repr)
def test_fields_that_ask_for_nothing(model: type[RequestBody], nothing: object) -> None:
    base = CHAT if model is ChatRequest else COMPLETION
    plain = model.model_validate(base)
    for name, field in model.model_fields.items():
        if field.is_required() or name in model.MEANINGFUL_NULL | model.MEANINGFUL_EMPTY:
            continue
        assert model.model_validate({**base, name: nothing}) == plain, name
    assert model.model_validate({**base, "no_field_of_ours": nothing, "audio": nothing}) == plain


SURROGATE: dict[str, Any] = {"type": "object", "properties": {"\ud800": {"const": ["\ud800"]}}}
UNPAIRED: list[tuple[dict[str, Any], str]] = [
    (
        {"tools": [{"type": "function", "function": {"name": "f", "parameters": SURROGATE}}]},
        "tools[0].function.parameters",
    ),
    ({"chat_template_kwargs": {"a": ["\ud800"]}}, "chat_template_kwargs"),
    ({"guided_json": SURROGATE}, "guided_json"),
    ({"structured_outputs": {"json": SURROGATE}}, "structured_outputs.json"),
    (
        {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": SURROGATE}}},
        "response_format.json_schema.schema",
    ),
]


@pytest.mark.parametrize(("fields", "path"), UNPAIRED, ids=[path for _, path in UNPAIRED])
def test_surrogates_are_found_at_any_depth(fields: dict[str, Any], path: str) -> None:
    param, message = refusal(ChatRequest, chat(**fields))
    assert param == path and message == f"{path}: must be valid Unicode, without lone surrogates."


STRICT: dict[str, Any] = {"type": "function", "function": {"name": "s", "strict": True}}
CONSTRAINED: list[tuple[dict[str, Any], str | None]] = [
    ({}, None),
    ({"tools": [FUNCTION]}, None),
    ({"tools": [FUNCTION], "tool_choice": "required"}, "tool_choice"),
    ({"tools": [FUNCTION], "tool_choice": {"type": "function", "function": {"name": "f"}}}, "tool_choice"),
    ({"tools": [FUNCTION, STRICT]}, "tools"),
    ({"tools": [FUNCTION, STRICT], "tool_choice": "none"}, None),
    ({"tools": [STRICT], "guided_regex": "a"}, "guided_regex"),
]


@pytest.mark.parametrize(("fields", "field"), CONSTRAINED)
def test_the_field_that_asks_for_a_grammar(fields: dict[str, Any], field: str | None) -> None:
    """It is named if the grammar fails, and its request waits for the threads that compile grammars."""
    assert ChatRequest.model_validate({**CHAT, **fields}).grammar_field() == field


def test_calls_of_an_answer_are_taken_as_history() -> None:
    """Whatever the model called, and however often; fields that clients add."""
    calls = [{**CALL, "function": {"name": name, "arguments": "{}"}} for name in ("добавь", "mcp/add", "x" * 300)] * 100
    history = {"role": "assistant", "content": None, "tool_calls": calls, "provider_specific_fields": {"refusal": None}}
    result = {"role": "tool", "tool_call_id": "c", "content": "5", "cache_control": {"type": "ephemeral"}}
    body = ChatRequest.model_validate(chat(history, result, {**CHAT["messages"][0], "type": "text"}))
    assert [call["function"]["name"] for call in body.messages[1].for_template()["tool_calls"][:2]] == [
        "добавь",
        "mcp/add",
    ]
    assert "cache_control" not in body.messages[2].for_template()
    tool = {"type": "function", "function": {**FUNCTION["function"], "cache_control": {"type": "ephemeral"}}}
    assert ChatRequest.model_validate(chat(tools=[tool])).plain_tools == [FUNCTION]


def test_an_object_in_place_of_a_name() -> None:
    tool_choice: dict[str, Any] = {"type": "function"}
    param, message = refusal(ChatRequest, chat(tools=[FUNCTION], tool_choice=tool_choice))
    assert param == "tool_choice.function" and message == "tool_choice.function: is required."


def test_an_object_of_too_many_fields() -> None:
    """Each costs time, even one that asks for nothing."""
    param, message = refusal(ChatRequest, chat({"role": "user", "content": "x", **{f"f{i}": None for i in range(500)}}))
    assert param == "messages[1]" and message == "messages[1]: must have at most 256 fields, not 502."


@pytest.mark.parametrize("prompt", [["a"] * 129, [[1]] * 129], ids=["texts", "tokens"])
def test_prompts_are_counted_before_they_are_read(prompt: list[Any]) -> None:
    assert len(CompletionRequest.model_validate({**COMPLETION, "prompt": prompt[1:]}).prompts()) == 128
    param, message = refusal(CompletionRequest, {**COMPLETION, "prompt": prompt})
    assert param == "prompt" and "at most 128 items" in message
    assert CompletionRequest.model_validate({**COMPLETION, "prompt": [1] * 129}).prompts() == [[1] * 129]


def test_null_has_its_own_meaning_in_one_field() -> None:
    assert CompletionRequest.model_validate(COMPLETION).max_tokens == 16
    assert CompletionRequest.model_validate({**COMPLETION, "max_tokens": None}).max_tokens is None


def test_empty_schemas_and_texts_mean_something() -> None:
    assert ChatRequest.model_validate({**CHAT, "guided_json": {}}).constraints() == {"guided_json": {}}
    schema = {"type": "json_schema", "json_schema": {"name": "x", "schema": {}}}
    path = "response_format.json_schema.schema"
    assert list(ChatRequest.model_validate({**CHAT, "response_format": schema}).constraints()) == [path]
    assert Message.model_validate({"role": "user", "content": ""}).content == ""


def test_an_answer_is_history() -> None:
    """As OpenAI's Python client dumps its messages."""
    dump = {
        **{"role": "assistant", "content": "A page.", "refusal": None, "annotations": [], "audio": None},
        **{"function_call": None, "tool_calls": None, "reasoning_content": "Hm", "parsed": None},
    }
    body = ChatRequest.model_validate(chat(dump, {"role": "user", "content": "And?"}))
    assert body.messages[1].for_template() == {
        "role": "assistant",
        "content": "A page.",
        "reasoning_content": "Hm",
    }
    calls = {"role": "assistant", "content": None, "tool_calls": [{**CALL, "index": 0}]}
    result = {
        "role": "tool",
        "tool_call_id": "c",
        "content": [{"type": "text", "text": "42", "cache_control": {"a": 1}}],
    }
    body = ChatRequest.model_validate(chat(calls, result))
    assert body.messages[1].for_template() == {"role": "assistant", "tool_calls": [CALL]}
    assert body.messages[2].for_template()["content"] == [{"type": "text", "text": "42"}]


@pytest.mark.parametrize(
    "fields",
    [
        {"modalities": ["text"]},
        {"use_beam_search": False, "length_penalty": 1.0, "priority": 0, "detokenize": True},
        {"tools": [FUNCTION], "tool_choice": "auto", "parallel_tool_calls": False},
        {"tool_choice": "none"},
        {"n": 8.0, "seed": 3.0, "top_k": -1.0, "max_tokens": 5.0, "logprobs": True, "top_logprobs": 2.0},
        {"stop": [str(i) for i in range(64)]},
        {"user": "u1", "prompt_cache_key": "a", "safety_identifier": "b", "service_tier": "auto"},
    ],
    ids=lambda fields: ",".join(fields)[:40],
)
def test_what_clients_send_is_taken(fields: dict[str, Any]) -> None:
    ChatRequest.model_validate({**CHAT, **fields})


@pytest.mark.parametrize("value", [8.5, "8", True, 1e300, float("1e19")], ids=repr)
def test_a_whole_number_is_whole(value: object) -> None:
    assert refusal(ChatRequest, {**CHAT, "n": value})[0] == "n"


BAD: list[tuple[dict[str, Any], str, str]] = [
    (chat(shout=1), "shout", "not a field of this API"),
    (chat({"role": "user", "content": "a", "nom": "x"}), "messages[1].nom", "not a field of this API"),
    (chat({"role": "user"}), "messages[1].content", "is required in a message with role user"),
    (chat({"role": "tool", "content": None}), "messages[1].content", "is required in a message with role tool"),
    (chat({"role": "wizard", "content": "a"}), "messages[1].role", "must be 'system', 'developer'"),
    (chat({"content": "a"}), "messages[1].role", "is required"),
    (chat({"role": "user", "content": 5}), "messages[1].content", "got 5"),
    (chat({"role": "user", "content": [{"type": "text"}]}), "messages[1].content[0].text", "is required"),
    (chat({"role": "user", "content": [{"type": "image_url"}]}), "messages[1].content[0].type", "must be 'text'"),
    (
        chat({"role": "user", "content": "a", "tool_calls": [CALL]}),
        "messages[1].tool_calls",
        "only an assistant message",
    ),
    (
        chat({"role": "assistant", "tool_calls": [{"function": {}}]}),
        "messages[1].tool_calls[0].function.name",
        "is required",
    ),
    (chat(messages=[]), "messages", "at least 1 item"),
    (chat(messages=None), "messages", "valid list, got null"),
    (chat(stream_options={"include_usage": True}), "stream_options", "requires stream=true"),
    (chat(stream=True, stream_options={"x": 1}), "stream_options.x", "not a field"),
    (chat(stream=True, prompt_logprobs=1), "prompt_logprobs", "is not supported with stream=true"),
    (chat(max_tokens=2, min_tokens=3), "min_tokens", "must not exceed max_tokens (2), got 3"),
    (chat(max_tokens=2, max_completion_tokens=3), "max_tokens", "alias of max_completion_tokens"),
    (chat(top_logprobs=2), "top_logprobs", "requires logprobs=true"),
    (chat(response_format={"type": "json_schema"}), "response_format.json_schema", "is required"),
    (
        chat(response_format={"type": "json_schema", "json_schema": {"schema": {}}}),
        "response_format.json_schema.name",
        "is required",
    ),
    (chat(response_format={"type": "yaml Hi" * 100}), "response_format.type", "'json_schema'"),
    (chat(response_format={"json_schema": {}}), "response_format.type", "is required"),
    (chat({"role": "user", "content": [{"type": "text", "text": 5}]}), "messages[1].content[0].text", "valid string"),
    (chat({"role": "user", "content": [{"type": "text", "text": "a"}, "x"]}), "messages[1].content[1]", "object"),
    (chat(stop=["a", 5]), "stop[1]", "valid string"),
    (chat(tools=[FUNCTION], tool_choice={"type": "function", "function": 5}), "tool_choice.function", "object"),
    (
        chat(tools=[{"type": "function", "function": {"name": "f", "parameters": {"type": "array"}}}]),
        "tools[0].function.parameters.type",
        "must be object",
    ),
    (chat(guided_json={}, guided_regex="a"), "guided_regex", "got guided_json and guided_regex"),
    (chat(structured_outputs={"regex": "a", "choice": ["b"]}), "structured_outputs.choice", "one constraint"),
    (chat(structured_outputs={"backend": "x"}), "structured_outputs.backend", "not a field"),
    (chat(tool_choice="required"), "tool_choice", "requires tools"),
    (chat(tools=[FUNCTION, FUNCTION]), "tools", "names must be unique"),
    (chat(tools=[{"type": "function", "function": {"name": "a b"}}]), "tools[0].function.name", "pattern"),
    (
        chat(tools=[FUNCTION], tool_choice={"type": "function", "function": {"name": "g"}}),
        "tool_choice.function.name",
        "one of the tools",
    ),
    (
        chat(tools=[FUNCTION], tool_choice="required", guided_regex="a"),
        "guided_regex",
        "can't be combined with a forced tool call",
    ),
    (chat(continue_final_message=True, add_generation_prompt=True), "continue_final_message", "can't be combined"),
    (
        chat({"role": "assistant", "reasoning": "a", "reasoning_content": "b"}),
        "messages[1].reasoning",
        "must not differ",
    ),
    (chat(truncate_prompt_tokens=0), "truncate_prompt_tokens", "must be -1 or at least 1, got 0"),
    (chat(stop=["a"] * 65), "stop", "at most 64 items"),
    (chat(stop=["a", ""]), "stop[1]", "at least 1 character"),
    (chat(logit_bias={"x": 1}), "logit_bias.x", "pattern"),
    (chat(n=129), "n", "less than or equal to 128, got 129"),
    (chat(function_call={"name": "f"}), "function_call", "not a field"),
    (chat(modalities=["text", "audio"]), "modalities", "not a field"),
]


@pytest.mark.parametrize(("body", "param", "message"), BAD, ids=[param for _, param, _ in BAD])
def test_a_refusal_names_its_field(body: dict[str, Any], param: str, message: str) -> None:
    found, said = refusal(ChatRequest, body)
    assert found == param and said.startswith(f"{param}: ") and message in said, said
    assert len(said) < 400 and "Hi" not in said, "the body is not echoed"


def test_completions_name_theirs() -> None:
    assert refusal(CompletionRequest, {"model": "m"}) == ("prompt", "prompt: is required.")
    assert refusal(CompletionRequest, {**COMPLETION, "max_tokens": 0})[0] == "max_tokens"
    assert refusal(CompletionRequest, {**COMPLETION, "n": 2, "best_of": 1})[0] == "best_of"
    assert refusal(CompletionRequest, {**COMPLETION, "prompt": [[1, -1]]})[0] == "prompt[0][1]"
    assert refusal(CompletionRequest, {**COMPLETION, "prompt": [1, "a"]})[0] == "prompt[1]"
    assert refusal(CompletionRequest, {**COMPLETION, "prompt": [[1, "a"]]})[0] == "prompt[0][1]"
    assert refusal(CompletionRequest, {**COMPLETION, "messages": [1]})[0] == "messages"


@given(st.recursive(st.none() | st.booleans() | st.integers() | st.text(max_size=5), lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5) | st.sampled_from(["role", "content", "function", "name"]), inner, max_size=3), max_leaves=10))  # fmt: skip
def test_any_value_is_taken_or_refused_by_a_field(value: Any) -> None:
    for name in ("messages", "tools", "tool_choice", "response_format", "stop", "logit_bias", "structured_outputs"):
        try:
            ChatRequest.model_validate({**CHAT, name: value})
        except ValidationError:
            param, message = refusal(ChatRequest, {**CHAT, name: value})
            assert param is not None and param.startswith(name) and message.startswith(param)
