"""Bodies of agents and chat front ends: every field that their types have, null where nothing is set."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

from tests.helpers.scripted_model import Script
from tests.helpers.tool_call_text import calls_text

READ = {
    "type": "function",
    "function": {
        "name": "read_file",
        "description": "Reads a file of the workspace.",
        "parameters": {
            "$schema": "http://json-schema.org/draft-07/schema#",
            "type": "object",
            "properties": {
                "path": {"type": "string", "format": "uri-reference", "description": "Relative"},
                "lines": {"type": ["array", "null"], "items": {"type": "integer", "minimum": 1}, "default": None},
            },
            "required": ["path"],
            "additionalProperties": False,
        },
    },
}
NOTHING = {"type": "function", "function": {"name": "list_tasks", "description": "", "parameters": {}}}
ARGUMENTS = '{"path": "a.py"}'
CALL = {"id": "call_1", "type": "function", "function": {"name": "read_file", "arguments": ARGUMENTS}}
EPHEMERAL = {"type": "ephemeral"}
USER = {"role": "user", "content": "Look at a.py"}

BODIES: dict[str, dict[str, Any]] = {
    # aider/models.py, Model.send_completion, through LiteLLM; aider/prompts with cache_control on parts
    "aider": {
        "messages": [
            {"role": "system", "content": [{"type": "text", "text": "You edit.", "cache_control": EPHEMERAL}]},
            {"role": "user", "content": "Change nothing."},
            {"role": "assistant", "content": "Ok."},
            {"role": "user", "content": [{"type": "text", "text": "Now do.", "cache_control": EPHEMERAL}]},
        ],
        "stream": True,
        "temperature": 0,
        "tools": None,
        "tool_choice": None,
    },
    # backend/open_webui/utils/payload.py: parameters of a model's settings, the rest of the form dropped or null
    "open webui": {
        "stream": True,
        "messages": [
            {"role": "system", "content": "Be kind."},
            USER,
            {"role": "assistant", "content": "", "tool_calls": [{**CALL, "index": 0}]},
            {"role": "tool", "tool_call_id": "call_1", "content": "print()"},
        ],
        "stream_options": {"include_usage": True},
        "tools": [READ],
        "temperature": 0.8,
        "seed": 0,
        "stop": [],
        "logit_bias": {},
        "response_format": None,
        "reasoning_effort": None,
        "files": [],
        "features": {},
    },
    # backend/open_webui/routers/tasks.py: titles and tags
    "open webui title": {
        "messages": [{"role": "user", "content": "A title in JSON"}],
        "stream": False,
        "max_completion_tokens": 20,
        "metadata": {"task": "title_generation", "chat_id": "c1", "task_body": {}},
    },
    # LibreChat: packages/api/src/endpoints/openai/llm.ts, through LangChain's ChatOpenAI for JavaScript
    "librechat": {
        "model": "tiny",
        "messages": [
            {"role": "developer", "content": "Be short."},
            {"role": "user", "content": [{"type": "text", "text": "Hi"}], "name": "Ann"},
        ],
        "temperature": 1,
        "top_p": 1,
        "presence_penalty": 0,
        "frequency_penalty": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
        "user": "65f0c0ffee",
        "stop": None,
        "tools": [],
        "modalities": ["text"],
        "service_tier": "auto",
    },
    # n8n's "AI Agent" node, also LangChain for JavaScript
    "n8n": {
        "messages": [
            {"role": "system", "content": "You are a helpful assistant"},
            {"role": "user", "content": "Look", "name": None},
            {"role": "assistant", "content": "", "tool_calls": [CALL]},
            {"role": "tool", "content": "[]", "tool_call_id": "call_1", "name": "read_file"},
        ],
        "temperature": 0.7,
        "top_p": 1,
        "frequency_penalty": 0,
        "presence_penalty": 0,
        "n": 1,
        "logit_bias": None,
        "logprobs": None,
        "top_logprobs": None,
        "max_tokens": None,
        "seed": None,
        "response_format": {"type": "text"},
        "tools": [READ],
        "tool_choice": None,
        "parallel_tool_calls": None,
        "functions": None,
        "function_call": None,
        "prediction": None,
        "audio": None,
        "stream": False,
    },
    # src/core/api/providers/openai.ts of Cline, for models of the reasoning kind
    "cline": {
        "messages": [
            {"role": "developer", "content": "You are Cline."},
            {
                "role": "user",
                "content": [{"type": "text", "text": "<task>Look</task>"}, {"type": "text", "text": "env"}],
            },
            {"role": "assistant", "content": None, "tool_calls": [CALL]},
            {"role": "tool", "tool_call_id": "call_1", "content": "print()"},
        ],
        "reasoning_effort": "medium",
        "stream": True,
        "stream_options": {"include_usage": True},
        "tools": [READ, NOTHING],
    },
    # src/api/providers/openai.ts of Roo Code
    "roo": {
        "temperature": 0,
        "messages": [
            {"role": "system", "content": [{"type": "text", "text": "You are Roo.", "cache_control": EPHEMERAL}]},
            {"role": "user", "content": [{"type": "text", "text": "Look", "cache_control": EPHEMERAL}]},
        ],
        "stream": True,
        "stream_options": {"include_usage": True},
        "tools": [{**READ, "function": {**READ["function"], "strict": True}}],
        "tool_choice": "auto",
        "parallel_tool_calls": False,
        "max_completion_tokens": 64,
    },
    # core/llm/openaiTypeConverters.ts of Continue
    "continue": {
        "messages": [USER, {"role": "assistant", "content": " ", "tool_calls": [CALL]}, {**USER, "content": "Go on"}],
        "max_tokens": 64,
        "temperature": 0.5,
        "top_p": None,
        "frequency_penalty": None,
        "presence_penalty": None,
        "stream": True,
        "stop": ["/src/", "```"],
        "prediction": None,
        "tools": [{**READ, "function": {**READ["function"], "strict": None}}],
    },
    # openhands/llm/llm.py through LiteLLM: what LiteLLM's own message type dumps comes back as history
    "openhands": {
        "messages": [
            {"role": "system", "content": [{"type": "text", "text": "You are OpenHands.", "cache_control": EPHEMERAL}]},
            {"role": "user", "content": [{"type": "text", "text": "Look"}]},
            {
                "role": "assistant",
                "content": "I read it.",
                "tool_calls": [CALL],
                "function_call": None,
                "provider_specific_fields": {},
                "reasoning_content": None,
                "thinking_blocks": None,
                "annotations": [],
            },
            {
                "role": "tool",
                "tool_call_id": "call_1",
                "name": "read_file",
                "content": [{"type": "text", "text": "print()", "cache_control": EPHEMERAL}],
            },
        ],
        "tools": [{**READ, "cache_control": EPHEMERAL}],
        "temperature": 0.0,
        "top_p": 1.0,
        "max_completion_tokens": 64,
        "seed": None,
        "stop": None,
    },
}


def post(url: str, body: dict[str, Any]) -> httpx.Response:
    return httpx.post(f"{url}/v1/chat/completions", json={"model": "tiny", **body}, timeout=30)


@pytest.mark.parametrize("name", BODIES)
def test_an_answer(model: Script, url: str, name: str) -> None:
    model.script = "Fine."
    answer = post(url, BODIES[name])
    assert answer.status_code == 200, answer.text
    assert answer.text.endswith("data: [DONE]\n\n") if BODIES[name].get("stream") else answer.json()["choices"]
    assert '"error"' not in answer.text


@pytest.mark.parametrize("name", [name for name, body in BODIES.items() if body.get("tools")])
def test_a_call(model: Script, url: str, name: str) -> None:
    model.script = calls_text(("read_file", ARGUMENTS))
    answer = post(
        url,
        {
            **BODIES[name],
            "stream": False,
            "stream_options": None,
            **dict.fromkeys(("max_tokens", "max_completion_tokens")),
        },
    )
    assert answer.status_code == 200, answer.text
    (call,) = answer.json()["choices"][0]["message"]["tool_calls"]
    assert call["function"] == {"name": "read_file", "arguments": ARGUMENTS}


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"web_search_options": {"search_context_size": "low"}}, "web_search_options"),
        ({"modalities": ["text", "audio"]}, "modalities"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
            "messages[0].content[0].type",
        ),
    ],
)
def test_what_is_missing_is_named(url: str, fields: dict[str, Any], param: str) -> None:
    answer = post(url, {**BODIES["librechat"], **fields})
    assert answer.status_code == 400 and answer.json()["error"]["param"] == param
