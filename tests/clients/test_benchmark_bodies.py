"""Bodies of benchmark programs that are too heavy to install, and what their parsers need of each chunk."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest

from tests.helpers.scripted_model import Script

PROMPT = "Benchmark\x02"
MESSAGES = [{"role": "user", "content": "Benchmark"}]
PARTS = [{"role": "user", "content": [{"type": "text", "text": "Benchmark"}]}]
USAGE = {"include_usage": True}
CONTINUOUS = {"include_usage": True, "continuous_usage_stats": True}
TOKENS = 12
"""More than the script: `ignore_eos` must count."""

BODIES: dict[str, dict[str, Any]] = {
    # vllm/benchmarks/lib/endpoint_request_func.py, with the sampling flags of vllm/benchmarks/serve.py
    "vllm openai": {
        "prompt": PROMPT,
        "repetition_penalty": 1.0,
        "max_tokens": TOKENS,
        "logprobs": None,
        "stream": True,
        "stream_options": USAGE,
        "ignore_eos": True,
        "temperature": 0.0,
    },
    "vllm openai-chat": {
        "messages": PARTS,
        "max_completion_tokens": TOKENS,
        "stream": True,
        "stream_options": USAGE,
        "ignore_eos": True,
        "top_p": 0.9,
        "top_k": -1,
        "min_p": 0.0,
        "temperature": 0.7,
        "frequency_penalty": 0.0,
        "presence_penalty": 0.0,
        "repetition_penalty": 1.0,
    },
    # guidellm/backends/openai/request_handlers.py
    "guidellm text": {
        "stream": True,
        "stream_options": CONTINUOUS,
        "max_tokens": TOKENS,
        "stop": None,
        "ignore_eos": True,
        "prompt": PROMPT,
    },
    "guidellm chat": {
        "stream": True,
        "stream_options": CONTINUOUS,
        "max_completion_tokens": TOKENS,
        "stop": None,
        "ignore_eos": True,
        "messages": PARTS,
    },
    # sglang/benchmark/backends/oai_client.py and oai_chat_client.py, before in sglang/bench_serving.py
    "sglang completions": {
        "prompt": PROMPT,
        "temperature": 0.0,
        "best_of": 1,
        "max_tokens": TOKENS,
        "stream": True,
        "ignore_eos": True,
    },
    "sglang chat": {
        "messages": MESSAGES,
        "temperature": 0.0,
        "max_completion_tokens": TOKENS,
        "stream": True,
        "ignore_eos": True,
    },
    # aiperf/endpoints/openai_completions.py and openai_chat.py, with --extra-inputs
    "aiperf completions": {
        "prompt": [PROMPT],
        "stream": True,
        "max_tokens": TOKENS,
        "ignore_eos": True,
        "min_tokens": TOKENS,
        "stream_options": USAGE,
    },
    "aiperf chat": {
        "messages": [{"role": "user", "name": "tester", "content": "Benchmark"}],
        "stream": True,
        "max_completion_tokens": TOKENS,
        "ignore_eos": True,
        "stream_options": CONTINUOUS,
    },
    # genai_perf/inputs/converters/openai_completions_converter.py and openai_chat_completions_converter.py
    "genai-perf completions": {"prompt": [PROMPT], "stream": True, "max_tokens": TOKENS, "ignore_eos": True},
    "genai-perf chat": {
        "messages": MESSAGES,
        "stream": True,
        "max_tokens": TOKENS,
        "min_tokens": TOKENS,
        "ignore_eos": True,
    },
}


def chunks(url: str, body: dict[str, Any]) -> list[dict[str, Any]]:
    """The events of a stream: lines as these programs take them, each `data: ` and JSON, the last one [DONE]."""
    path = "completions" if "prompt" in body else "chat/completions"
    answer = httpx.post(f"{url}/v1/{path}", json={"model": "tiny", **body}, timeout=30)
    assert answer.status_code == 200, answer.text
    *found, done = [line for line in answer.text.split("\n") if line]
    assert done == "data: [DONE]" and all(line.startswith("data: ") for line in found)
    return [json.loads(line.removeprefix("data: ")) for line in found]


def text_of(chunk: dict[str, Any]) -> str:
    choice = chunk["choices"][0]
    return str(choice["text"] if "text" in choice else choice["delta"].get("content") or "")


@pytest.mark.parametrize("name", BODIES)
def test_a_stream(model: Script, url: str, name: str) -> None:
    model.script = "fast"
    body = BODIES[name]
    found = chunks(url, body)
    options = body.get("stream_options", {})
    if options.get("include_usage"):
        last = found.pop()
        assert last["choices"] == [], "vLLM reads the usage only of a chunk without choices"
        assert last["usage"]["completion_tokens"] == TOKENS and last["usage"]["prompt_tokens"] > 0
    assert all(chunk["choices"] for chunk in found), "SGLang indexes the first choice of every other chunk"
    assert "".join(map(text_of, found)).startswith("fast")
    assert [chunk["choices"][0]["finish_reason"] for chunk in found] == [*[None] * (len(found) - 1), "length"]
    kind = "text_completion" if "prompt" in body else "chat.completion.chunk"
    assert {chunk["object"] for chunk in found} == {kind} and len({chunk["id"] for chunk in found}) == 1
    if options.get("continuous_usage_stats"):
        counted = [chunk["usage"]["completion_tokens"] for chunk in found]
        assert counted == sorted(counted) and set(range(1, TOKENS + 1)) <= set(counted), "one more with each token"
    else:
        assert not any(chunk.get("usage") for chunk in found)


def test_a_chunk_for_each_token(model: Script, url: str) -> None:
    """Latencies between tokens are those between chunks, whatever the tokens' text."""
    model.script = ""  # so that every token is the end token, which has none
    found = chunks(url, BODIES["vllm openai"])
    assert len(found) == TOKENS + 2, "the tokens, the end and the usage"


def test_without_streaming(model: Script, url: str) -> None:
    """--disable-stream of SGLang's, which reads these fields."""
    model.script = "fast"
    for name in ("sglang completions", "sglang chat"):
        path = "completions" if "completions" in name else "chat/completions"
        answer = httpx.post(f"{url}/v1/{path}", json={"model": "tiny", **BODIES[name], "stream": False}).json()
        assert answer["usage"]["completion_tokens"] == TOKENS
        assert answer["choices"][0].get("message", {}).get("content", answer["choices"][0].get("text")) == "fast"
