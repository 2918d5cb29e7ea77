"""OpenAI's Python client: tools as its documentation streams them, parsed answers, and an agent's loop."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import openai
import pytest
from pydantic import BaseModel

from tests.helpers.in_process import client_of
from tests.helpers.scripted_model import Script
from tests.helpers.tool_call_text import calls_text

WEATHER: Any = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather of a city",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}},
            "required": ["city"],
            "additionalProperties": False,
        },
        "strict": True,
    },
}
QUESTION: Any = {"role": "user", "content": "Weather in Paris and Rome?"}
ASKED: Any = {"model": "tiny", "messages": [QUESTION], "tools": [WEATHER]}
PARIS, ROME = '{"city": "Paris"}', '{"city": "Rome"}'
PARIS_FACTS = '{"name": "Paris", "inhabitants": 2100000}'
SAID = f"I look it up.{calls_text(('get_weather', PARIS), ('get_weather', ROME))}"


class City(BaseModel):
    name: str
    inhabitants: int


class Count(BaseModel):
    inhabitants: int


@pytest.fixture
def client(url: str) -> openai.OpenAI:
    return client_of(url)


def add(calls: dict[int, Any], delta: Any) -> None:
    """Accumulates streamed calls as the function-calling guide does."""
    for call in delta.tool_calls or []:
        if call.index not in calls:
            calls[call.index] = call
        else:
            calls[call.index].function.arguments += call.function.arguments


def check(calls: dict[int, Any]) -> None:
    assert [(c.function.name, c.function.arguments) for c in calls.values()] == [
        ("get_weather", PARIS),
        ("get_weather", ROME),
    ]
    assert len({c.id for c in calls.values()}) == 2 and {c.type for c in calls.values()} == {"function"}


def test_streamed_tools(model: Script, client: openai.OpenAI) -> None:
    model.script = SAID
    calls: dict[int, Any] = {}
    text, reasons = "", []
    for chunk in client.chat.completions.create(**ASKED, stream=True):
        (choice,) = chunk.choices
        add(calls, choice.delta)
        text += choice.delta.content or ""
        reasons.append(choice.finish_reason)
    check(calls)
    assert text == "I look it up." and reasons[-1] == "tool_calls" and set(reasons[:-1]) == {None}


def test_streamed_tools_async(model: Script, url: str) -> None:
    model.script = SAID

    async def stream(client: openai.AsyncOpenAI) -> dict[int, Any]:
        calls: dict[int, Any] = {}
        async for chunk in await client.chat.completions.create(**ASKED, stream=True):
            add(calls, chunk.choices[0].delta)
        return calls

    async def three() -> list[dict[int, Any]]:
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
            return await asyncio.gather(*(stream(client) for _ in range(3)))

    for calls in asyncio.run(three()):
        check(calls)


def test_stream_helper(model: Script, client: openai.OpenAI) -> None:
    """It parses arguments as they come, and adds the parts up itself."""
    model.script = SAID
    with client.chat.completions.stream(**ASKED, stream_options={"include_usage": True}) as stream:
        kinds = [event.type for event in stream]
        answer = stream.get_final_completion()
    assert "tool_calls.function.arguments.delta" in kinds and kinds.count("tool_calls.function.arguments.done") == 2
    message = answer.choices[0].message
    assert message.content == "I look it up." and answer.choices[0].finish_reason == "tool_calls"
    assert [call.function.parsed_arguments for call in message.tool_calls or []] == [
        json.loads(PARIS),
        json.loads(ROME),
    ]
    assert answer.usage is not None and answer.usage.completion_tokens > 0


def test_parse(model: Script, client: openai.OpenAI) -> None:
    model.script = PARIS_FACTS
    answer = client.chat.completions.parse(model="tiny", messages=[QUESTION], response_format=City)
    assert answer.choices[0].message.parsed == City(name="Paris", inhabitants=2_100_000)
    model.script = "Two million."
    held = client.chat.completions.parse(model="tiny", messages=[QUESTION], response_format=Count)
    assert isinstance(held.choices[0].message.parsed, Count)


def test_parse_cut_short(model: Script, client: openai.OpenAI) -> None:
    model.script = PARIS_FACTS
    with pytest.raises(openai.LengthFinishReasonError):
        client.chat.completions.parse(model="tiny", messages=[QUESTION], response_format=City, max_tokens=5)


def test_agent_loop(model: Script, client: openai.OpenAI) -> None:
    """The answer goes back as the client dumps it, with all of its null fields."""
    messages = [QUESTION]
    model.script = SAID
    first = client.chat.completions.create(model="tiny", messages=messages, tools=[WEATHER]).choices[0]
    assert first.finish_reason == "tool_calls"
    messages.append(first.message.model_dump())
    for call in first.message.tool_calls or []:
        messages.append({"role": "tool", "tool_call_id": call.id, "content": "sunny"})
    assert None in messages[1].values() and len(messages) == 4
    model.script = "Both are sunny."
    final = client.chat.completions.create(model="tiny", messages=messages, tools=[WEATHER]).choices[0]
    assert final.message.content == "Both are sunny." and final.finish_reason == "stop"
    messages += [final.message.model_dump(), {"role": "user", "content": "Thanks."}]
    model.script = "Welcome."
    again = client.chat.completions.create(model="tiny", messages=messages, tools=[WEATHER]).choices[0]
    assert again.message.content == "Welcome."


def test_agent_loop_of_parsed_messages(model: Script, client: openai.OpenAI) -> None:
    """The client's own fields, `parsed` and `parsed_arguments`, come back too."""
    tool = openai.pydantic_function_tool(City)
    model.script = calls_text(("City", PARIS_FACTS))
    called = client.chat.completions.parse(model="tiny", messages=[QUESTION], tools=[tool]).choices[0].message
    (call,) = called.tool_calls or []
    assert call.function.parsed_arguments == City(name="Paris", inhabitants=2_100_000)
    model.script = '{"inhabitants": 2100000}'
    parsed = client.chat.completions.parse(model="tiny", messages=[QUESTION], response_format=Count).choices[0].message
    model.script = "Done."
    for one, other in ((called, parsed), (called.model_dump(), parsed.model_dump(warnings=False))):
        result = {"role": "tool", "tool_call_id": call.id, "content": "saved"}
        messages: list[Any] = [QUESTION, one, result, other, QUESTION]
        answer = client.chat.completions.create(model="tiny", messages=messages, tools=[tool])
        assert answer.choices[0].message.content == "Done."
