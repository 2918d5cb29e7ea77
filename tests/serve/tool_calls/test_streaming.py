"""The cuts of a stream make no difference, and a token costs little."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from jax_mla_cp.serve.tool_calls import FORMATS
from tests.serve.tool_calls.formats import BEGIN, NAMES, TOOLS, WEATHER, Reading, head, read, section, tagged

DOCUMENTS, CUTS = 260, 10
"""For each of the four formats: more than 10,000 random cuts in all."""

PROPERTIES: dict[str, Any] = {
    "s": {"type": "string"},
    "n": {"type": "integer"},
    "o": {"anyOf": [{"type": "string"}, {"type": "null"}]},
    "u": {"type": ["string", "integer", "boolean"]},
    "l": {"type": ["array", "object"]},
    "any": {},
}
FUNCTION = {"name": "f", "parameters": {"type": "object", "properties": PROPERTIES}}
ALL_TOOLS = [*TOOLS, {"type": "function", "function": FUNCTION}]
WORDS = [
    "f",
    "now",
    "\n",
    " ",
    "<",
    "`",
    '"',
    "\\",
    "{",
    "}",
    "[",
    "1",
    "null",
    "nul",
    "é世",
    "```json\n",
    "\n```",
    "</b>",
]


def outcome(found: Reading) -> tuple[str, list[tuple[str, str]], bool]:
    return found.content, found.calls, found.is_incomplete


def cut(text: str, rng: random.Random) -> list[str]:
    places = sorted(rng.choices(range(len(text) + 1), k=rng.randint(1, 12)))
    return [text[a:b] for a, b in zip([0, *places], [*places, len(text)], strict=True)]


@st.composite
def documents(draw: st.DrawFn, name: str) -> str:
    """Calls, whole and broken, between texts that are made of the format's markers and of what matters to a parser."""
    values = st.lists(st.sampled_from(WORDS), max_size=6).map("".join)
    markers = [*FORMATS[name].markers, *(marker[:-3] for marker in FORMATS[name].markers)]
    heads = [BEGIN[name] + head(name, "f"), head(name, "now")]
    pieces = st.one_of(
        st.sampled_from([*WORDS, *markers, *heads]),
        values,
        st.dictionaries(st.sampled_from(sorted(PROPERTIES)), values).map(
            lambda arguments: section(name, ("f", json.dumps(arguments)), ("now", "{}"))
        ),
        st.dictionaries(st.sampled_from(sorted(PROPERTIES)), values).map(
            lambda arguments: tagged(arguments) if name == "glm47" else json.dumps(arguments, indent=1)
        ),
    )
    return "".join(draw(st.lists(pieces, max_size=14)))


@pytest.mark.parametrize("name", NAMES)
def test_streaming_equals_whole(name: str) -> None:
    with_calls = 0

    @settings(max_examples=DOCUMENTS, deadline=None, suppress_health_check=list(HealthCheck), database=None)
    @example(section(name, ("f", '{"s": "x"}'), ("now", "{}")), 0)
    @given(documents(name), st.integers(0, 2**32))
    def check(text: str, seed: int) -> None:
        nonlocal with_calls
        rng = random.Random(seed)
        whole = outcome(read(name, [text], ALL_TOOLS))
        with_calls += bool(whole[1])
        for _ in range(CUTS):
            assert outcome(read(name, cut(text, rng), ALL_TOOLS)) == whole
        assert outcome(read(name, text, ALL_TOOLS)) == whole

    check()
    assert with_calls > DOCUMENTS / 10, "the documents have to have calls"


def test_the_comparison_sees_a_parser_that_depends_on_cuts() -> None:
    """Negative control: a reader without memory over a cut."""
    text, rng = section("kimi_k2", ("now", "{}")), random.Random(0)
    whole = outcome(read("kimi_k2", [text]))
    pieces = [cut(text, rng) for _ in range(CUTS)]
    assert any([read("kimi_k2", [piece]).calls for piece in some] != [whole[1]] for some in pieces)


TOKEN = 4
"""Characters."""
LIMIT = 20e-6
"""Seconds of a token of what models write; a token of garbage may take three times as long."""
GARBAGE = ("angles", "begun markers", "begun calls")


def seconds_per_token(name: str, text: str, tools: Sequence[Any] = TOOLS) -> float:
    tokens = [text[i : i + TOKEN] for i in range(0, len(text), TOKEN)]
    costs = []
    for _ in range(2):
        parser = FORMATS[name].new_parser(tools)
        started = time.thread_time()
        for token in tokens:
            parser.push(token)
        parser.finish()
        costs.append((time.thread_time() - started) / len(tokens))
    return min(costs)


LONG = {
    "text": "All the words of a file. ",
    "code": 'if (a < b && c[\\"x\\"] > 1) {\\n    `d`;\\n}\\n',
    "white space": "    ",
    "angles": "<<<<",
    "begun markers": "</arg_valu <｜tool▁call▁en <|tool_call_en ",
    "escapes": '\\\\\\"',
    "begun calls": "<tool_call>f <|tool_calls_section_begin|><|tool_call_begin|>functions.f <｜tool▁calls▁begin｜>",
}


@pytest.mark.parametrize("kind", LONG)
@pytest.mark.parametrize("name", NAMES)
def test_cost_of_a_token(name: str, kind: str) -> None:
    """In a string argument of 100,000 characters, and in as long a content."""
    long = (LONG[kind] * 100_000)[:100_000]
    argument = "<arg_key>city</arg_key><arg_value>" if name == "glm47" else '{"city": "'
    begun = BEGIN[name] + head(name, "get_weather") + argument
    limit = 3 * LIMIT if kind in GARBAGE else LIMIT
    assert seconds_per_token(name, begun + long) < limit
    assert seconds_per_token(name, long) < limit


@pytest.mark.parametrize(
    ("inside", "limit"),
    [("[1, 2, 3.5e7],\n", LIMIT), ("    ", LIMIT), ("<<<<", 3 * LIMIT), ("````", 3 * LIMIT), ("```\n", 3 * LIMIT)],
)
@pytest.mark.parametrize("name", NAMES)
def test_cost_of_a_token_outside_of_strings(name: str, inside: str, limit: float) -> None:
    long = (inside * 100_000)[:100_000]
    keys = ("hours", "days", "other") if name == "glm47" else ("",)
    for key in keys:
        argument = f"<arg_key>{key}</arg_key><arg_value>" if key else ""
        assert seconds_per_token(name, BEGIN[name] + head(name, "get_weather") + argument + long) < limit


def test_many_small_arguments_and_a_large_schema() -> None:
    """A key is looked up in its schema at a bounded cost."""
    wide = {"anyOf": [{"enum": list(range(1000))}] * 10_000}
    tools = [
        {
            "type": "function",
            "function": {"name": "f", "parameters": {"properties": {"a": wide, **WEATHER["properties"]}}},
        }
    ]
    text = "<tool_call>f" + "<arg_key>a</arg_key><arg_value>1</arg_value>" * 2000
    assert seconds_per_token("glm47", text, tools) < LIMIT
    calls = "<tool_call>f</tool_call>" * 4000
    assert seconds_per_token("glm47", calls, tools) < LIMIT
