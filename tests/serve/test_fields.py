"""The effect of each field of a request, with the built-in model on two devices and the real `openai` client."""

from __future__ import annotations

import asyncio
import collections
import functools
import json
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest

from jax_mla_cp.engine import Engine
from jax_mla_cp.launch import load
from jax_mla_cp.mesh import MeshShape, make_mesh
from jax_mla_cp.serve.served_model import ServedModel
from jax_mla_cp.step.cache_sizing import create_runner
from tests.helpers.engine_requests import is_idle
from tests.helpers.in_process import client_of, serving
from tests.helpers.waiting import until

PROMPT = "The context parallel prefill is a way of"
SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 6}, "ok": {"type": "boolean"}},
    "required": ["name", "ok"],
    "additionalProperties": False,
}
FORMAT = {"type": "json_schema", "json_schema": {"name": "test", "schema": SCHEMA}}


@pytest.fixture(scope="module")
def served() -> ServedModel:
    model, tokenizer = load(mesh=make_mesh(MeshShape.parse("cp=2")))
    runner = create_runner(
        model, page_size=16, kv_pages=128, memory_fraction=None, prefill_chunk=64, max_model_len=512, max_running=8
    )
    eos = model.config.eos_token_ids
    return ServedModel("tiny", Engine(runner), tokenizer, model.config.vocab_size, runner.max_model_len, eos, None)


@pytest.fixture(scope="module")
def url(served: ServedModel) -> Iterator[str]:
    with serving(served) as address:
        yield address


@pytest.fixture(scope="module")
def client(url: str) -> openai.OpenAI:
    return client_of(url)


def complete(url: str, **fields: Any) -> Any:
    """The answer to a greedy completion of `PROMPT`, with what the fields change; as the server writes it."""
    body = {"model": "tiny", "prompt": PROMPT, "temperature": 0, "max_tokens": 8, **fields}
    answer = httpx.post(f"{url}/v1/completions", json=body, timeout=120)
    assert answer.status_code == 200, answer.text
    return answer.json()


def text(url: str, **fields: Any) -> str:
    return complete(url, **fields)["choices"][0]["text"]


def ids(url: str, **fields: Any) -> list[int]:
    """The tokens of an answer."""
    logprobs = complete(url, logprobs=0, **fields)["choices"][0]["logprobs"]
    return [token_of(url, name) for name in logprobs["tokens"]]


@functools.cache  # the same few are asked for again and again
def token_of(url: str, name: str) -> int:
    if name.startswith("token_id:"):
        return int(name.removeprefix("token_id:"))
    body = {"prompt": name, "add_special_tokens": False}
    (token,) = httpx.post(f"{url}/tokenize", json=body).json()["tokens"]
    return token


def prompt_ids(url: str, prompt: str = PROMPT) -> list[int]:
    return httpx.post(f"{url}/tokenize", json={"prompt": prompt}).json()["tokens"]


def test_echo_with_logprobs_as_lm_eval_asks(url: str) -> None:
    prompts = [prompt_ids(url), prompt_ids(url, "A shorter one, 世界")]
    answer = complete(url, prompt=prompts, echo=True, logprobs=1, max_tokens=1)
    for prompt, choice in zip(prompts, answer["choices"], strict=True):
        logprobs = choice["logprobs"]
        assert {len(values) for values in logprobs.values()} == {len(prompt) + 1}
        assert logprobs["token_logprobs"][0] is None and logprobs["top_logprobs"][0] is None
        places = zip(logprobs["tokens"], logprobs["token_logprobs"], logprobs["top_logprobs"], strict=True)
        for token, own, top in list(places)[1:]:
            assert top[token] == own and max(top.values()) >= own and len(top) in (1, 2)
        for token, at in zip(logprobs["tokens"], logprobs["text_offset"], strict=True):
            assert token.startswith("token_id:") or choice["text"][at:].startswith(token)
    assert answer["choices"][0]["text"].startswith(PROMPT)


def test_echoed_numbers_are_those_of_generation(url: str) -> None:
    generated = complete(url, logprobs=3)["choices"][0]["logprobs"]
    whole = prompt_ids(url) + ids(url)
    echoed = complete(url, prompt=whole, echo=True, logprobs=3, max_tokens=0)["choices"][0]
    assert echoed["finish_reason"] == "length" and len(echoed["logprobs"]["tokens"]) == len(whole)
    assert echoed["logprobs"]["token_logprobs"][-8:] == pytest.approx(generated["token_logprobs"], abs=1e-3)
    assert echoed["logprobs"]["tokens"][-8:] == generated["tokens"]
    assert [set(top) for top in echoed["logprobs"]["top_logprobs"][-8:]] == [set(t) for t in generated["top_logprobs"]]


def test_prompt_logprobs(url: str) -> None:
    prompt = prompt_ids(url)
    answer = complete(url, prompt_logprobs=2, max_tokens=1)["choices"][0]
    echoed = complete(url, echo=True, logprobs=2, max_tokens=0)["choices"][0]["logprobs"]
    places = answer["prompt_logprobs"]
    assert places[0] is None and len(places) == len(prompt) and answer["text"] != PROMPT
    for token, place, own in zip(prompt[1:], places[1:], echoed["token_logprobs"][1:], strict=True):
        assert place[str(token)]["logprob"] == own
        ranks = sorted(p["rank"] for p in place.values() if p["rank"] is not None)
        assert ranks[:2] == [1, 2] and len(place) in (2, 3)
    assert "prompt_logprobs" not in complete(url, max_tokens=1)["choices"][0]


@pytest.mark.parametrize("stream", [False, True])
def test_echo_alone_is_the_prompt_and_the_answer(client: openai.OpenAI, url: str, stream: bool) -> None:
    arguments: Any = {"model": "tiny", "prompt": PROMPT, "max_tokens": 8, "temperature": 0, "echo": True, "n": 2}
    answer = client.completions.create(**arguments, stream=stream)
    found: dict[int, str] = collections.defaultdict(str)
    for part in answer if stream else [answer]:
        for choice in part.choices:
            found[choice.index] += choice.text
    assert found == dict.fromkeys(range(2), PROMPT + text(url))
    assert text(url, echo=True, max_tokens=0) == PROMPT


def test_seeds_and_choices(url: str) -> None:
    def drawn(**fields: Any) -> list[str]:
        answer = complete(url, temperature=1.5, **fields)
        assert answer["usage"]["prompt_tokens"] == len(prompt_ids(url))
        return [choice["text"] for choice in sorted(answer["choices"], key=lambda c: c["index"])]

    three = drawn(n=3, seed=5)
    assert three == [drawn(seed=seed)[0] for seed in (5, 6, 7)] and len(set(three)) == 3
    assert drawn(seed=5) != drawn(seed=8)
    assert len(set(drawn(n=4))) > 1


def test_a_bias_forces_and_forbids(url: str) -> None:
    first = ids(url)[0]
    assert ids(url, logit_bias={"300": 100}) == [300] * 8
    assert first not in ids(url, logit_bias={str(first): -100})


def test_ends(url: str, served: ServedModel) -> None:
    (eos,) = served.eos_token_ids
    tokens = ids(url)
    third = tokens[2]
    ended = complete(url, stop_token_ids=[third])["choices"][0]
    assert ended["finish_reason"] == "stop" and ended["stop_reason"] == third
    assert complete(url, stop_token_ids=[third])["usage"]["completion_tokens"] == tokens.index(third) + 1
    only_eos = {"logit_bias": {str(eos): 100}}
    now = complete(url, **only_eos)
    assert (now["choices"][0]["text"], now["usage"]["completion_tokens"]) == ("", 1)
    assert now["choices"][0]["finish_reason"] == "stop" and now["choices"][0]["stop_reason"] is None
    assert complete(url, **only_eos, min_tokens=5)["usage"]["completion_tokens"] == 6
    assert complete(url, **only_eos, ignore_eos=True)["usage"]["completion_tokens"] == 8


def test_penalties(url: str) -> None:
    """Some of the eight tokens that a bias leaves come again and again, unless they are made less likely."""
    bias = {str(300 + n): 100 for n in range(8)}
    eight = {"logit_bias": bias, "max_tokens": 40, "ignore_eos": True, "temperature": 1.0, "seed": 5}
    plain = ids(url, **eight)

    def kinds(**fields: Any) -> int:
        return len(set(ids(url, **eight, **fields)))

    usual = len(set(plain))
    for penalty in ("presence_penalty", "frequency_penalty"):
        assert kinds(**{penalty: -2.0}) < usual < kinds(**{penalty: 2.0})
    assert kinds(repetition_penalty=100.0) > usual
    assert ids(url, **eight, repetition_penalty=1.0) == plain


def test_what_leaves_one_token_is_greedy(url: str) -> None:
    greedy, hot = text(url), {"temperature": 2, "seed": 1}
    assert text(url, **hot) != greedy
    for only in ({"min_p": 1.0}, {"top_k": 1}, {"top_p": 1e-6}):
        assert text(url, **hot, **only) == greedy
    for off in ({"top_k": -1}, {"top_k": 0}, {"min_p": 0.0}):
        assert text(url, **hot, **off) == text(url, **hot)


def test_stop_strings_across_chunks(client: openai.OpenAI, url: str) -> None:
    whole = text(url, max_tokens=24)
    stop = whole[6:12]
    stopped = complete(url, max_tokens=24, stop=["nowhere", stop])["choices"][0]
    assert stopped["text"] == whole[: whole.index(stop)] and stopped["stop_reason"] == stop
    chunks = list(
        client.completions.create(model="tiny", prompt=PROMPT, max_tokens=24, temperature=0, stop=stop, stream=True)
    )
    assert "".join(c.choices[0].text for c in chunks) == stopped["text"]
    assert chunks[-1].choices[0].finish_reason == "stop"
    assert whole.index(stop) < len(text(url, max_tokens=24, stop=stop, min_tokens=20))


@pytest.mark.parametrize("stream", [False, True])
def test_a_schema_is_followed(client: openai.OpenAI, stream: bool) -> None:
    arguments: Any = {
        "model": "tiny",
        "messages": [{"role": "user", "content": "Who?"}],
        "n": 2,
        "seed": 3,
        "temperature": 1.5,
        "max_tokens": 480,  # JSON may have any white space between its parts
    }
    found: dict[int, str] = collections.defaultdict(str)
    answer = client.chat.completions.create(**arguments, response_format=FORMAT, stream=stream)
    for part in answer if stream else [answer]:
        for choice in part.choices:
            found[choice.index] += (choice.delta if stream else choice.message).content or ""
    assert set(found) == {0, 1}
    for said in found.values():
        value = json.loads(said)
        assert set(value) == {"name", "ok"} and len(value["name"]) <= 6 and isinstance(value["ok"], bool)
    free = client.chat.completions.create(**arguments).choices[0].message.content or ""
    with pytest.raises(ValueError):
        json.loads(free)


def test_formats_of_completions(url: str) -> None:
    fields = {"temperature": 1.2, "seed": 4, "max_tokens": 100}
    assert isinstance(json.loads(text(url, **fields, response_format=FORMAT)), dict)
    assert text(url, response_format={"type": "json_object"}).startswith("{")
    assert text(url, response_format={"type": "text"}) == text(url)
    # The grammar's end is the answer's, also where an end token would not be one.
    ended = complete(url, **fields, response_format=FORMAT, ignore_eos=True)["choices"][0]
    assert json.loads(ended["text"]) and ended["finish_reason"] == "stop"


def test_cached_tokens_and_salts(url: str) -> None:
    prompt = [7 + n % 200 for n in range(100)]

    def cached(**fields: Any) -> int:
        return complete(url, prompt=prompt, **fields)["usage"]["prompt_tokens_details"]["cached_tokens"]

    assert cached() == 0
    assert cached() >= 64
    assert cached(cache_salt="mine") == 0
    assert cached(cache_salt="mine") >= 64


def test_what_has_no_effect(url: str) -> None:
    fields = {"user": "me", "metadata": {"a": "b"}, "store": True, "service_tier": "flex", "best_of": 1, "n": 1}
    assert text(url, **fields) == text(url)
    nothing = dict.fromkeys(("logprobs", "stop", "seed", "n", "echo", "logit_bias", "response_format", "stream"))
    assert text(url, **nothing) == text(url)


def test_chat_is_the_template_and_a_completion(client: openai.OpenAI, url: str) -> None:
    messages: Any = [
        {"role": "system", "content": "Be short. "},
        {"role": "user", "content": [{"type": "text", "text": "What is "}, {"type": "text", "text": "a mesh?"}]},
        {"role": "assistant", "content": "An array of devices.", "reasoning_content": "Hm."},
        {"role": "user", "content": "And an axis?"},
    ]
    prompt = httpx.post(f"{url}/tokenize", json={"messages": messages}).json()
    assert prompt["count"] == len(prompt["tokens"]) and prompt["max_model_len"] == 512
    arguments: Any = {"model": "tiny", "messages": messages, "temperature": 0, "max_completion_tokens": 12}
    answer = client.chat.completions.create(**arguments, logprobs=True, top_logprobs=2)
    choice = answer.choices[0]
    assert choice.message.role == "assistant" and choice.message.content == text(
        url, prompt=prompt["tokens"], max_tokens=12
    )
    assert answer.usage is not None and answer.usage.prompt_tokens == prompt["count"]
    assert choice.logprobs is not None and choice.logprobs.content
    said = b"".join(bytes(entry.bytes or ()) for entry in choice.logprobs.content)
    assert said.decode(errors="replace") == choice.message.content
    for entry in choice.logprobs.content:
        assert len(entry.top_logprobs) == 2 and entry.top_logprobs[0].logprob == entry.logprob

    arguments |= {"logprobs": True, "top_logprobs": 2, "stream": True, "stream_options": {"include_usage": True}}
    chunks = list(client.chat.completions.create(**arguments))
    told = [e for c in chunks[:-1] if c.choices[0].logprobs for e in c.choices[0].logprobs.content or ()]
    assert [e.token for e in told] == [e.token for e in choice.logprobs.content]
    assert [e.logprob for e in told] == pytest.approx([e.logprob for e in choice.logprobs.content], abs=1e-3)
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(c.choices[0].delta.content or "" for c in chunks[:-1]) == choice.message.content
    assert chunks[-1].choices == [] and chunks[-1].usage == answer.usage.model_copy(
        update={"prompt_tokens_details": chunks[-1].usage and chunks[-1].usage.prompt_tokens_details}
    )
    assert chunks[-2].choices[0].finish_reason == choice.finish_reason


def test_no_usage_chunk_unless_asked(url: str) -> None:
    body = {"model": "tiny", "prompt": PROMPT, "max_tokens": 2, "stream": True}
    lines = [line for line in httpx.post(f"{url}/v1/completions", json=body).text.split("\n") if line]
    assert lines[-1] == "data: [DONE]" and all(line.startswith("data: ") for line in lines)
    chunks = [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]
    assert chunks and all(len(chunk["choices"]) == 1 and "usage" not in chunk for chunk in chunks)


def test_tokens_there_and_back(url: str, served: ServedModel) -> None:
    for prompt in ("héllo 世界 👩‍👧", ""):
        given = httpx.post(f"{url}/tokenize", json={"prompt": prompt, "return_token_strs": True}).json()
        assert given["count"] == len(given["token_strs"]) == len(given["tokens"])
        back = httpx.post(f"{url}/detokenize", json={"tokens": given["tokens"]}).json()
        assert back == {"prompt": prompt}
    info = httpx.get(f"{url}/tokenizer_info").json()
    assert info["eos_token"] == "<｜end▁of▁sentence｜>" and "<｜User｜>" in info["chat_template"]
    assert served.tokenizer is not None and served.tokenizer.token_id(info["eos_token"]) in served.eos_token_ids


def test_the_async_client_and_a_stream_that_is_left(url: str, served: ServedModel) -> None:
    async def run() -> str:
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
            arguments: Any = {"model": "tiny", "messages": [{"role": "user", "content": "Hi"}], "temperature": 0}
            endless: Any = {"max_tokens": 400, "stream": True, "extra_body": {"ignore_eos": True}}
            stream = await client.chat.completions.create(**arguments, **endless)
            async for chunk in stream:
                if chunk.choices[0].delta.content:
                    break
            await stream.close()
            answers = await asyncio.gather(
                *(client.chat.completions.create(**arguments, max_tokens=5) for _ in range(3))
            )
            assert len({answer.choices[0].message.content for answer in answers}) == 1
            return answers[0].choices[0].message.content or ""

    assert asyncio.run(run())
    until(lambda: is_idle(served.engine), 5)  # what was left does not go on
