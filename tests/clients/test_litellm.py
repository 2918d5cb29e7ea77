"""LiteLLM, which OpenHands, aider and proxies are built on."""

from __future__ import annotations

import os
from typing import Any

import pytest

from tests.helpers.scripted_model import Script
from tests.helpers.tool_call_text import calls_text

pytestmark = pytest.mark.slow  # its import takes seconds
TOOL = {
    "type": "function",
    "function": {
        "name": "run",
        "description": "Runs a command",
        "parameters": {"type": "object", "properties": {"command": {"type": "string"}}, "required": ["command"]},
    },
}
QUESTION = {"role": "user", "content": "List the files."}
ARGUMENTS = '{"command": "ls"}'


@pytest.fixture(scope="module")
def litellm() -> Any:
    os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # or its import downloads a price list
    import litellm

    return litellm


@pytest.fixture
def to_tiny(url: str) -> dict[str, Any]:
    """Arguments of its calls that name the server."""
    return {"model": "openai/tiny", "api_base": f"{url}/v1", "api_key": "none", "num_retries": 0}


def test_tools(model: Script, litellm: Any, to_tiny: dict[str, Any]) -> None:
    """Answers go back as LiteLLM dumps them."""
    model.script = calls_text(("run", ARGUMENTS))
    first = litellm.completion(**to_tiny, messages=[QUESTION], tools=[TOOL], tool_choice="auto").choices[0]
    (call,) = first.message.tool_calls
    assert (call.function.name, call.function.arguments) == ("run", ARGUMENTS)
    assert first.finish_reason == "tool_calls"
    result = {"role": "tool", "tool_call_id": call.id, "name": "run", "content": "README.md"}
    model.script = "One file."
    for message in (first.message, first.message.model_dump()):
        answer = litellm.completion(**to_tiny, messages=[QUESTION, message, result], tools=[TOOL])
        assert answer.choices[0].message.content == "One file." and answer.usage.total_tokens > 0


def test_stream_of_tools(model: Script, litellm: Any, to_tiny: dict[str, Any]) -> None:
    model.script = f"I look.{calls_text(('run', ARGUMENTS), ('run', ARGUMENTS))}"
    asked = {"messages": [QUESTION], "tools": [TOOL], "stream": True, "stream_options": {"include_usage": True}}
    whole = litellm.stream_chunk_builder(list(litellm.completion(**to_tiny, **asked)), messages=[QUESTION])
    (choice,) = whole.choices
    assert choice.message.content == "I look." and choice.finish_reason == "tool_calls"
    assert [(call.function.name, call.function.arguments) for call in choice.message.tool_calls] == [
        ("run", ARGUMENTS),
        ("run", ARGUMENTS),
    ]
    assert whole.usage.completion_tokens == len(model.script.encode()) + 1, "the server's count, with the end token"


def test_reasoning(model: Script, litellm: Any, to_tiny: dict[str, Any]) -> None:
    model.script = "Hm.</think>Yes."
    message = litellm.completion(**to_tiny, messages=[{"role": "user", "content": "open"}]).choices[0].message
    assert (message.reasoning_content, message.content) == ("Hm.", "Yes.")


def test_refusals(litellm: Any, to_tiny: dict[str, Any]) -> None:
    with pytest.raises(litellm.BadRequestError, match="n: must be"):
        litellm.completion(**to_tiny, messages=[QUESTION], n=1000)
    with pytest.raises(litellm.ContextWindowExceededError):
        litellm.completion(**to_tiny, messages=[{"role": "user", "content": "a" * 2000}])
