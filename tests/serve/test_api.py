"""Answers of the HTTP routes over the stand-in model, driven by the real `openai` client and by raw requests."""

from __future__ import annotations

import itertools
from concurrent.futures import ThreadPoolExecutor

import httpx
import openai

from tests.helpers.page_server import PageServer, text_of, until_idle
from tests.helpers.standin import VOCAB, continuation


def test_completion(client: openai.OpenAI) -> None:
    answer = client.completions.create(model="tiny", prompt="Hello", max_tokens=20, temperature=0)
    want = continuation([256, *b"Hello"], 20, frozenset({3}))
    assert answer.choices[0].text == text_of(want)
    assert answer.choices[0].finish_reason == ("stop" if want[-1] == 3 else "length")
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (6, len(want))


def test_eos_ends_unless_ignored(client: openai.OpenAI) -> None:
    prompt = next([n] for n in range(250) if 3 in continuation([n], 60))
    stopped = client.completions.create(model="tiny", prompt=prompt, max_tokens=60)
    assert stopped.choices[0].finish_reason == "stop"
    ignored = client.completions.create(model="tiny", prompt=prompt, max_tokens=60, extra_body={"ignore_eos": True})
    assert ignored.usage is not None and ignored.usage.completion_tokens == 60


def test_eight_at_once_streaming_and_not(client: openai.OpenAI, page_server: PageServer) -> None:
    def both(length: int) -> tuple[str, str, str]:
        prompt = [(length + t) % VOCAB for t in range(length)]
        arguments = {"model": "tiny", "prompt": prompt, "max_tokens": 30}
        chunks = list(client.completions.create(**arguments, stream=True))
        whole = client.completions.create(**arguments).choices[0].text
        return "".join(c.choices[0].text for c in chunks), whole, text_of(continuation(prompt, 30, frozenset({3})))

    with ThreadPoolExecutor(8) as pool:
        for streamed, whole, want in pool.map(both, [1, 2, 17, 64, 100, 300, 400, 500]):
            assert streamed == whole == want
    until_idle(page_server)


def test_many_prompts_usage_and_logprobs(client: openai.OpenAI) -> None:
    chunks = list(
        client.completions.create(
            model="tiny",
            prompt=[[1, 2], [5]],
            max_tokens=4,
            stream=True,
            stream_options={"include_usage": True},
            logprobs=2,
        )
    )
    assert chunks[-1].choices == [] and chunks[-1].usage is not None and chunks[-1].usage.prompt_tokens == 3
    assert {c.choices[0].index for c in chunks[:-1]} == {0, 1}
    assert chunks[-1].usage.completion_tokens == sum(c.choices[0].logprobs is not None for c in chunks[:-1])
    answer = client.completions.create(model="tiny", prompt=[[1, 2], [5]], max_tokens=4, logprobs=2)
    assert [c.index for c in answer.choices] == [0, 1]
    for choice in answer.choices:
        logprobs = choice.logprobs
        assert logprobs is not None and logprobs.tokens and logprobs.token_logprobs and logprobs.top_logprobs
        assert len(logprobs.tokens) == len(logprobs.token_logprobs) == len(logprobs.top_logprobs)
        assert logprobs.text_offset is not None and logprobs.text_offset[0] == 0
        for token, logprob, top in zip(logprobs.tokens, logprobs.token_logprobs, logprobs.top_logprobs, strict=True):
            assert top[token] == logprob
        parts = [c.choices[0] for c in chunks[:-1] if c.choices[0].index == choice.index]
        told = [part.logprobs for part in parts if part.logprobs is not None]
        for field in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
            assert [value for part in told for value in getattr(part, field)] == getattr(logprobs, field)
        starts = itertools.accumulate((len(part.text) for part in parts), initial=0)
        assert logprobs.text_offset == list(starts)[: len(told)] and logprobs.text_offset[-1] > 0


def test_usage_counts_a_prompt_once_however_many_answers_it_has(page_server: PageServer, client: openai.OpenAI) -> None:
    prompts = [[t % 250 for t in range(41)], [7] * 20]
    for cached in (0, 40 + 16):
        answer = client.completions.create(model="tiny", prompt=prompts, n=3, max_tokens=5, logprobs=0, temperature=0)
        usage = answer.usage
        assert usage is not None and usage.prompt_tokens == 61 and usage.total_tokens == 61 + usage.completion_tokens
        assert [c.index for c in answer.choices] == list(range(6))
        assert [c.text for c in answer.choices] == [
            text_of(continuation(prompt, 5, frozenset({3}))) for prompt in prompts for _ in range(3)
        ]
        assert usage.completion_tokens == sum(len(c.logprobs.tokens or ()) for c in answer.choices if c.logprobs)
        assert usage.prompt_tokens_details is not None and usage.prompt_tokens_details.cached_tokens == cached
        until_idle(page_server)


def test_stop_strings(client: openai.OpenAI) -> None:
    whole = text_of(continuation([9, 9], 40, frozenset({3})))
    stop = whole[5:8]
    answer = client.completions.create(model="tiny", prompt=[9, 9], max_tokens=40, stop=[stop, "never in it"])
    assert answer.choices[0].text == whole[: whole.index(stop)]
    assert answer.choices[0].finish_reason == "stop"


def test_drafts_change_no_answer_and_are_counted() -> None:
    server = PageServer(draft_tokens=3)
    server.start()
    try:
        none_yet = {"drafted": 0, "accepted": 0, "acceptance_rate": 0.0}
        assert httpx.get(f"{server.url}/health").json() == {"status": "ok", "speculation": none_yet}
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
        answer = client.completions.create(model="tiny", prompt=[1, 2], max_tokens=40, logprobs=1)
        want = continuation([1, 2], 40, frozenset({3}))
        assert answer.choices[0].text == text_of(want)
        assert answer.choices[0].logprobs is not None and len(answer.choices[0].logprobs.tokens or []) == len(want)
        counts = httpx.get(f"{server.url}/health").json()["speculation"]
        assert 0 < counts["accepted"] < counts["drafted"]
        assert counts["acceptance_rate"] == counts["accepted"] / counts["drafted"]
    finally:
        server.stop()


def test_openapi_and_version(page_server: PageServer) -> None:
    paths = httpx.get(f"{page_server.url}/openapi.json").json()["paths"]
    assert {"/v1/completions", "/v1/models", "/health", "/version"} <= set(paths)
    assert httpx.get(f"{page_server.url}/version").json()["version"]


def test_openapi_says_what_is_answered(page_server: PageServer) -> None:
    spec = httpx.get(f"{page_server.url}/openapi.json").json()
    assert {"/v1/chat/completions", "/tokenize", "/detokenize", "/tokenizer_info"} <= set(spec["paths"])
    for path, operations in spec["paths"].items():
        for operation in operations.values():
            responses = operation["responses"]
            assert "422" not in responses, f"{path}: never sent"
            assert {"200", "400", "503", "default"} <= set(responses)
    streamed = spec["paths"]["/v1/chat/completions"]["post"]["responses"]["200"]["content"]
    assert set(streamed) == {"application/json", "text/event-stream"}
    for name in ("CompletionRequest", "ChatRequest", "TokenizeRequest", "Message"):
        assert spec["components"]["schemas"][name]["additionalProperties"] is False
    stop = spec["components"]["schemas"]["CompletionRequest"]["properties"]["stop"]["anyOf"]
    assert stop[0]["maxLength"] == 1024 and stop[1]["maxItems"] == 64
