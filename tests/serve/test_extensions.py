"""Fields beyond OpenAI's, as vLLM's and SGLang's clients send them, with a model that says what a test wants."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from tests.helpers.byte_tokenizer import BOS, EOS
from tests.helpers.scripted_model import Script, serving_script

SAID = "one. two. three."
USER = [{"role": "user", "content": "Hi"}]


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    model = Script(pages=1500, max_running=16, prefill_chunk=64)
    model.script = SAID
    with serving_script(model) as address:
        yield address


def complete(url: str, **fields: Any) -> dict[str, Any]:
    body = {"model": "tiny", "prompt": "Hi\x02", "max_tokens": 30, **fields}
    answer = httpx.post(f"{url}/v1/completions", json=body, timeout=60)
    assert answer.status_code == 200, answer.text
    return answer.json()


def chat(url: str, **fields: Any) -> dict[str, Any]:
    answer = httpx.post(f"{url}/v1/chat/completions", json={"model": "tiny", "messages": USER, **fields}, timeout=60)
    assert answer.status_code == 200, answer.text
    return answer.json()


def stream(url: str, path: str, body: dict[str, Any]) -> list[dict[str, Any]]:
    with httpx.stream("POST", url + path, json={"model": "tiny", "stream": True, **body}, timeout=60) as answer:
        assert answer.status_code == 200
        lines = [line.removeprefix("data: ") for line in answer.iter_lines() if line]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


def test_stop_strings_are_kept_if_asked_for(url: str) -> None:
    assert complete(url, stop=[". t"])["choices"][0]["text"] == "one"
    kept = complete(url, stop=[". t"], include_stop_str_in_output=True)["choices"][0]
    assert kept["text"] == "one. t" and kept["stop_reason"] == ". t" and kept["finish_reason"] == "stop"
    many = complete(url, stop=[f"never {i}" for i in range(63)] + [". th"])["choices"][0]
    assert many["text"] == "one. two" and many["stop_reason"] == ". th"


def test_special_tokens_are_shown_if_asked_for(url: str) -> None:
    fields = {"ignore_eos": True, "max_tokens": len(SAID) + 1}
    assert complete(url, **fields)["choices"][0]["text"] == SAID
    assert complete(url, skip_special_tokens=False, **fields)["choices"][0]["text"] == f"{SAID}<|eos|>"
    assert complete(url, skip_special_tokens=False)["choices"][0]["text"] == SAID, (
        "what ends an answer is not part of it"
    )


def test_token_ids(url: str) -> None:
    want = [*SAID.encode(), EOS]
    choice = complete(url, return_token_ids=True)["choices"][0]
    assert choice["prompt_token_ids"] == [*b"Hi\x02"] and choice["token_ids"] == want
    assert not complete(url)["choices"][0].keys() & {"prompt_token_ids", "token_ids"}
    answer = chat(url, return_token_ids=True)
    assert answer["prompt_token_ids"] == [*b"Hi\x02"] and answer["choices"][0]["token_ids"] == want
    chunks = stream(url, "/v1/completions", {"prompt": "Hi\x02", "max_tokens": 30, "return_token_ids": True})
    assert chunks[0]["choices"][0]["prompt_token_ids"] == [*b"Hi\x02"]
    assert [t for chunk in chunks for t in chunk["choices"][0].get("token_ids", [])] == want
    chunks = stream(url, "/v1/chat/completions", {"messages": USER, "return_token_ids": True})
    assert chunks[0]["prompt_token_ids"] == [*b"Hi\x02"]
    assert [t for chunk in chunks for t in chunk["choices"][0].get("token_ids", [])] == want


def test_tokens_by_their_ids(url: str) -> None:
    fields = {"logprobs": 1, "max_tokens": 3}
    assert complete(url, **fields)["choices"][0]["logprobs"]["tokens"] == ["o", "n", "e"]
    logprobs = complete(url, return_tokens_as_token_ids=True, **fields)["choices"][0]["logprobs"]
    assert logprobs["tokens"] == [f"token_id:{byte}" for byte in b"one"]
    content = chat(url, return_tokens_as_token_ids=True, logprobs=True, max_tokens=1)["choices"][0]["logprobs"][
        "content"
    ]
    assert content[0]["token"] == f"token_id:{ord('o')}" and content[0]["bytes"] == [ord("o")]


def test_prompts_are_truncated_at_their_start(url: str) -> None:
    for count, kept in ((2, b"i\x02"), (100, b"Hi\x02"), (None, b"Hi\x02")):
        choice = complete(url, truncate_prompt_tokens=count, return_token_ids=True)["choices"][0]
        assert choice["prompt_token_ids"] == [*kept]
    long = complete(url, prompt="a" * 700 + "\x02", truncate_prompt_tokens=-1)
    assert long["usage"]["prompt_tokens"] == 600 - 30
    echoed = complete(url, truncate_prompt_tokens=2, echo=True, logprobs=0, max_tokens=1)["choices"][0]
    assert echoed["text"] == "i\x02o" and echoed["logprobs"]["text_offset"] == [0, 1, 2]
    body = {"model": "tiny", "prompt": "a", "truncate_prompt_tokens": -1, "max_tokens": 600}
    answer = httpx.post(f"{url}/v1/completions", json=body)
    assert answer.status_code == 400 and answer.json()["error"]["code"] == "context_length_exceeded"


def test_text_offsets_while_a_stop_string_may_begin(url: str) -> None:
    """The text of "on" is held back as long as it may become the stop string; each token's own place is known all the same."""
    for stop, text, tokens in (("onward", "one. two", 8), ("e. tw", "on", 7)):
        fields = {"prompt": "Hi\x02", "logprobs": 0, "max_tokens": 8, "stop": [stop]}
        choice = complete(url, echo=True, **fields)["choices"][0]
        assert choice["text"] == f"Hi\x02{text}" and choice["logprobs"]["text_offset"] == list(range(3 + tokens))
        choices = [chunk["choices"][0] for chunk in stream(url, "/v1/completions", fields)]
        offsets = [at for choice in choices for at in (choice["logprobs"] or {}).get("text_offset", [])]
        assert offsets == list(range(tokens))


def test_text_offsets_of_an_echo_with_special_tokens(url: str) -> None:
    """A text's special tokens are as long as it spells them; those of ids as long as they are shown."""
    fields = {"echo": True, "logprobs": 0, "max_tokens": 1}
    special = len("<|eos|>")
    text = complete(url, prompt="a<|eos|>b\x02", **fields)["choices"][0]
    assert text["text"] == "a<|eos|>b\x02o"
    assert text["logprobs"]["text_offset"] == [0, 1, 1 + special, 2 + special, 3 + special]
    ids = {"prompt": [ord("a"), EOS, ord("b"), 2], **fields}
    hidden = complete(url, **ids)["choices"][0]
    assert hidden["text"] == "ab\x02o" and hidden["logprobs"]["text_offset"] == [0, 1, 1, 2, 3]
    shown = complete(url, skip_special_tokens=False, **ids)["choices"][0]
    assert shown["text"] == text["text"] and shown["logprobs"]["text_offset"] == text["logprobs"]["text_offset"]


def test_an_eos_that_the_request_names_is_its_stop_reason(url: str) -> None:
    fields = {"stop_token_ids": [EOS], "max_tokens": 30}
    for ignore_eos, reason in ((False, None), (True, EOS)):
        for answer in (complete(url, ignore_eos=ignore_eos, **fields), chat(url, ignore_eos=ignore_eos, **fields)):
            choice = answer["choices"][0]
            assert choice["finish_reason"] == "stop" and choice["stop_reason"] == reason


def test_usage_in_every_chunk(url: str) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    for path, body in (("/v1/completions", {"prompt": "Hi\x02"}), ("/v1/chat/completions", {"messages": USER})):
        chunks = stream(url, path, {**body, "max_tokens": 3, "stream_options": options})
        counts = [chunk["usage"]["completion_tokens"] for chunk in chunks if "usage" in chunk]
        assert counts[-1] == 3 and counts == sorted(counts) and len(counts) >= 4
        assert chunks[-1]["choices"] == [] and all(chunk["choices"] for chunk in chunks[:-1])
        chunks = stream(url, path, {**body, "max_tokens": 3, "stream_options": {"include_usage": True}})
        assert ["usage" in chunk for chunk in chunks] == [False] * (len(chunks) - 1) + [True]


def test_many_choices(url: str) -> None:
    choices = complete(url, n=128, max_tokens=2)["choices"]
    assert [choice["text"] for choice in choices] == ["on"] * 128


def test_bos_is_optional() -> None:
    with serving_script(Script(), prefix=[BOS]) as url:

        def prompt(ask: Any, **fields: Any) -> list[int]:
            answer = ask(url, return_token_ids=True, max_tokens=1, **fields)
            return answer.get("prompt_token_ids") or answer["choices"][0]["prompt_token_ids"]

        assert prompt(complete) == prompt(complete, add_special_tokens=True) == [BOS, *b"Hi\x02"]
        assert prompt(complete, add_special_tokens=False) == [*b"Hi\x02"]
        assert prompt(chat) == prompt(chat, add_special_tokens=False) == [*b"Hi\x02"], "the template writes it"
        assert prompt(chat, add_special_tokens=True) == [BOS, *b"Hi\x02"]
        echo = complete(url, echo=True, logprobs=0, max_tokens=1)["choices"][0]
        assert echo["logprobs"]["text_offset"] == [0, 0, 1, 2, 3], "BOS has no text in the client's"
