"""LangChain's ChatOpenAI: bound tools, and structured output by both methods."""

from __future__ import annotations

import pytest
from langchain_core.messages import AIMessageChunk, HumanMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI
from pydantic import BaseModel, Field

from tests.helpers.scripted_model import Script
from tests.helpers.tool_call_text import calls_text

QUESTION = HumanMessage("What is 2 times 3, and 4 times 5?")
SAID = calls_text(("multiply", '{"a": 2, "b": 3}'), ("multiply", '{"a": 4, "b": 5}'))
ARGUMENTS = [{"a": 2, "b": 3}, {"a": 4, "b": 5}]


@tool
def multiply(a: int, b: int) -> int:
    """Multiplies two numbers."""
    return a * b


class City(BaseModel):
    """A city."""

    name: str = Field(description="In English")
    inhabitants: int
    rivers: list[str] | None = None


PARIS = '{"name": "Paris", "inhabitants": 2100000, "rivers": ["Seine"]}'


@pytest.fixture
def llm(url: str) -> ChatOpenAI:
    return ChatOpenAI(base_url=f"{url}/v1", api_key="none", model="tiny", stream_usage=True, max_retries=0)


def test_bind_tools(model: Script, llm: ChatOpenAI) -> None:
    """A whole loop: the call, the tool's results, the answer."""
    bound = llm.bind_tools([multiply])
    model.script = SAID
    called = bound.invoke([QUESTION])
    assert [call["args"] for call in called.tool_calls] == ARGUMENTS and not called.invalid_tool_calls
    assert called.response_metadata["finish_reason"] == "tool_calls"
    results = [multiply.invoke(call) for call in called.tool_calls]
    assert all(isinstance(result, ToolMessage) for result in results)
    model.script = "6 and 20."
    answer = bound.invoke([QUESTION, called, *results])
    assert answer.content == "6 and 20." and answer.usage_metadata is not None


def test_stream_of_tools(model: Script, llm: ChatOpenAI) -> None:
    model.script = f"Easy.{SAID}"
    whole: AIMessageChunk | None = None
    for chunk in llm.bind_tools([multiply]).stream([QUESTION]):
        assert isinstance(chunk, AIMessageChunk)
        whole = chunk if whole is None else whole + chunk
    assert whole is not None and whole.content == "Easy."
    assert [call["args"] for call in whole.tool_calls] == ARGUMENTS and not whole.invalid_tool_calls
    assert whole.usage_metadata is not None and whole.usage_metadata["output_tokens"] > 0


@pytest.mark.parametrize("choice", ["any", "multiply", True])
def test_forced_tools(model: Script, llm: ChatOpenAI, choice: str | bool) -> None:
    model.script = calls_text(("multiply", '{"a": 2, "b": 3}'))
    called = llm.bind_tools([multiply], tool_choice=choice, parallel_tool_calls=False).invoke([QUESTION])
    assert [(call["name"], call["args"]) for call in called.tool_calls] == [("multiply", {"a": 2, "b": 3})]


@pytest.mark.parametrize("strict", [None, True])
@pytest.mark.parametrize("method", ["json_schema", "function_calling"])
def test_structured_output(model: Script, llm: ChatOpenAI, method: str, strict: bool | None) -> None:
    model.script = PARIS if method == "json_schema" else calls_text(("City", PARIS))
    city = llm.with_structured_output(City, method=method, strict=strict)  # type: ignore[arg-type]
    assert city.invoke([QUESTION]) == City(name="Paris", inhabitants=2_100_000, rivers=["Seine"])
    assert list(city.stream([QUESTION]))[-1] == City(name="Paris", inhabitants=2_100_000, rivers=["Seine"])


def test_json_mode(model: Script, llm: ChatOpenAI) -> None:
    model.script = PARIS
    found = llm.with_structured_output(City, method="json_mode").invoke([QUESTION])
    assert isinstance(found, City) and found.rivers == ["Seine"]
