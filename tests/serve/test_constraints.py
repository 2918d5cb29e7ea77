"""vLLM's `structured_outputs` and `guided_*` through both routes: what the model may not say, it does not say."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from tests.helpers.scripted_model import Script, serving_script

SCHEMA = {"type": "object", "properties": {"a": {"type": "integer", "maximum": 99}}, "required": ["a"], "additionalProperties": False}  # fmt: skip


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    model = Script(pages=1000, max_running=8, prefill_chunk=64)
    model.script = "Whatever you like."
    with serving_script(model) as address:
        yield address


def answer(url: str, **fields: Any) -> httpx.Response:
    if "prompt" in fields:
        return httpx.post(f"{url}/v1/completions", json={"model": "tiny", "max_tokens": 60, **fields}, timeout=60)
    body = {"model": "tiny", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 60, **fields}
    return httpx.post(f"{url}/v1/chat/completions", json=body, timeout=60)


def text(url: str, **fields: Any) -> str:
    found = answer(url, **fields)
    assert found.status_code == 200, found.text
    choice = found.json()["choices"][0]
    return choice["text"] if "text" in choice else choice["message"]["content"]


GRAMMAR = 'start: "yes" | "no" "!"'
CONSTRAINTS: list[tuple[str, Any, str]] = [
    ("regex", "[a-z]{3}[0-9]", r"[a-z]{3}[0-9]"),
    ("choice", ["red", "green (dark)"], r"red|green \(dark\)"),
    ("grammar", GRAMMAR, r"yes|no!"),
    ("json", SCHEMA, r'\{\s*"a"\s*:\s*-?[0-9]+\s*\}'),
    ("json", json.dumps(SCHEMA), r'\{\s*"a"\s*:\s*-?[0-9]+\s*\}'),
]


@pytest.mark.parametrize("route", [{}, {"prompt": "Hi\x02"}], ids=["chat", "completions"])
@pytest.mark.parametrize(("kind", "value", "pattern"), CONSTRAINTS, ids=[kind for kind, _, _ in CONSTRAINTS])
def test_constraints_hold(url: str, route: dict[str, Any], kind: str, value: Any, pattern: str) -> None:
    free = text(url, **route)
    assert free == "Whatever you like." and not re.fullmatch(pattern, free)
    assert re.fullmatch(pattern, text(url, **route, structured_outputs={kind: value}))
    assert re.fullmatch(pattern, text(url, **route, **{f"guided_{kind}": value}))


def test_any_object(url: str) -> None:
    assert json.loads(text(url, structured_outputs={"json_object": True})) == {}
    assert text(url, structured_outputs={"json_object": False}) == "Whatever you like."


BAD: list[tuple[dict[str, Any], str]] = [
    ({"structured_outputs": {"regex": "(a"}}, "structured_outputs.regex"),
    ({"guided_grammar": "start: nobody"}, "guided_grammar"),
    ({"guided_json": {"type": "wish"}}, "guided_json"),
    ({"guided_json": "no JSON"}, "guided_json"),
    ({"structured_outputs": {"choice": [""] * 10_000}}, "structured_outputs.choice"),
]


@pytest.mark.parametrize(("fields", "param"), BAD, ids=[param for _, param in BAD])
def test_what_can_not_be_held_is_refused(url: str, fields: dict[str, Any], param: str) -> None:
    found = answer(url, **fields)
    assert found.status_code == 400, found.text
    error = found.json()["error"]
    assert error["param"] == param and error["message"].startswith(f"{param}: ") and len(error["message"]) < 600
