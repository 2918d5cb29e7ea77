"""Grammars of calls, walked at random: whatever they allow is a call that the parser reads and the schema accepts."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Sequence
from typing import Any, Literal

import jsonschema
import numpy as np
import pytest
from llguidance import LLMatcher, LLParserLimits, LLTokenizer, TokenizerWrapper

from jax_mla_cp.engine import GrammarError
from jax_mla_cp.serve.tool_calls import FORMATS, CallRules, SchemaError
from tests.serve.tool_calls.formats import BEGIN, END, NAMES, Reading, head, read, section

Kind = Literal["special", "added", "none"]
"""The markers are special tokens, tokens with text, or no tokens of the vocabulary."""
END_TOKEN = 256
LIMITS = LLParserLimits(
    initial_lexer_fuel=1_000_000, max_grammar_size=100_000, max_lexer_states=50_000, verbose_errors=False
)

WEATHER: dict[str, Any] = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "enum": ["Łódź", 'a"b</', "x y"]},
        "days": {"type": "integer", "minimum": 1, "maximum": 20},
        "unit": {"$ref": "#/$defs/Unit"},
        "note": {"type": "string", "maxLength": 3},
        "code": {"type": "string", "pattern": "^[a-z/]{2}\\d$"},
        "maybe": {"anyOf": [{"type": "boolean"}, {"type": "null"}]},
        "spots": {
            "type": "array",
            "items": {"type": "object", "properties": {"x": {"type": "null"}}, "additionalProperties": False},
            "maxItems": 2,
        },
    },
    "required": ["city", "unit"],
    "additionalProperties": False,
    "$defs": {"Unit": {"enum": ["C", "F"]}},
}
TOOLS: list[dict[str, Any]] = [
    {"type": "function", "function": {"name": "get", "parameters": WEATHER, "strict": True}},
    {"type": "function", "function": {"name": "get_time"}},
    {
        "type": "function",
        "function": {
            "name": "ping",
            "parameters": {"type": "object", "properties": {"n": {"type": "boolean"}}, "additionalProperties": False},
        },
    },
]
SCHEMAS = {tool["function"]["name"]: tool["function"].get("parameters", {"maxProperties": 0}) for tool in TOOLS}
every_format = pytest.mark.parametrize("name", NAMES)
every_kind = pytest.mark.parametrize("kind", ["special", "added", "none"])


class Vocabulary:
    """Bytes, the end token, and a format's markers."""

    def __init__(self, name: str, kind: Kind):
        self.markers = () if kind == "none" else FORMATS[name].markers
        first = END_TOKEN + 1
        self.texts = [bytes([i]) for i in range(256)] + [b""] + [marker.encode() for marker in self.markers]
        special = range(END_TOKEN, len(self.texts) if kind == "special" else first)
        self.tokens = [b"<%d>" % i if i in special else text for i, text in enumerate(self.texts)]
        self.special_token_ids = list(special)
        self.eos_token_id = END_TOKEN
        self.bos_token_id = None
        self.llguidance = LLTokenizer(TokenizerWrapper(self), eos_token=[END_TOKEN])

    def __call__(self, text: str) -> list[int]:
        return list(text.encode())

    def token_id(self, text: str) -> int | None:
        return END_TOKEN + 1 + self.markers.index(text) if text in self.markers else None

    def encode(self, text: str) -> list[int]:
        """The markers as tokens."""
        tokens: list[int] = []
        while text:
            marker = next((marker for marker in self.markers if text.startswith(marker)), None)
            token = None if marker is None else self.token_id(marker)
            tokens += list(text[0].encode()) if token is None else [token]
            text = text[1:] if marker is None else text.removeprefix(marker)
        return tokens


GET_TIME = [tool for tool in TOOLS if tool["function"]["name"] == "get_time"]


class Held:
    """An output that is held by a grammar."""

    def __init__(self, name: str, kind: Kind, tools: Sequence[Any] = TOOLS, **arguments: Any):
        vocabulary = Vocabulary(name, kind)
        rules = CallRules(**{"tools": tools, "required": True, "parallel": True, **arguments})
        text = FORMATS[name].grammar(rules, vocabulary.token_id)
        self.vocabulary = vocabulary
        self._matcher = LLMatcher(vocabulary.llguidance, text, log_level=0, limits=LIMITS)
        assert not self._matcher.is_error(), self._matcher.get_error()

    def allowed(self) -> list[int]:
        mask = np.frombuffer(self._matcher.compute_bitmask(), np.uint32)
        assert not self._matcher.is_error(), self._matcher.get_error()
        return [i for i in range(len(self.vocabulary.texts)) if int(mask[i // 32]) >> i % 32 & 1]

    def accepts(self, text: str, *, to_the_end: bool = True) -> bool:
        """True if the text, with markers as tokens, is allowed, and may end."""
        for token in self.vocabulary.encode(text):
            if token not in self.allowed():
                return False
            self._matcher.consume_token(token)
        return not to_the_end or END_TOKEN in self.allowed()

    def walk(self, seed: int) -> str:
        """A random output. Ends and markers are taken when they are allowed, more often than not, or it would go on for long."""
        rng, text = np.random.default_rng(seed), b""
        for _ in range(20_000):
            allowed = self.allowed()
            closing = [token for token in allowed if token >= END_TOKEN or token in b'"}]']
            token = int(rng.choice(closing if closing and rng.random() < 0.7 else allowed))
            if token == END_TOKEN:
                return text.decode()
            text += self.vocabulary.texts[token]
            self._matcher.consume_token(token)
        raise AssertionError(f"no end: {text[-200:]!r}")


def check_calls(found: Reading) -> None:
    assert found.calls and not found.is_incomplete
    for function, arguments in found.calls:
        jsonschema.validate(json.loads(arguments), SCHEMAS[function])


@every_kind
@every_format
def test_required(name: str, kind: Kind) -> None:
    called = set()
    counts = set()
    for seed in range(30):
        found = read(name, [Held(name, kind).walk(seed)], TOOLS)
        check_calls(found)
        assert found.content == ""
        called |= {function for function, _ in found.calls}
        counts.add(len(found.calls))
    assert called == set(SCHEMAS) and len(counts) > 1


@every_kind
@every_format
def test_a_named_function(name: str, kind: Kind) -> None:
    for seed in range(4):
        found = read(name, [Held(name, kind, GET_TIME, parallel=False).walk(seed)], TOOLS)
        ((function, arguments),) = found.calls
        assert function == "get_time" and json.loads(arguments) == {} and found.content == ""


@every_kind
@every_format
def test_what_the_template_writes_is_allowed(name: str, kind: Kind) -> None:
    weather = json.dumps(
        {"city": "x y", "days": 3, "unit": "C", "note": "é\n😀", "code": "a/7", "maybe": None, "spots": [{"x": None}]},
        ensure_ascii=False,
    )
    text = section(name, ("get", weather), ("get_time", "{}"), ("ping", '{"n": true}'))
    assert Held(name, kind).accepts(text)
    assert Held(name, kind).accepts("\n" + text)


@every_kind
@every_format
def test_what_is_not_allowed(name: str, kind: Kind) -> None:
    def allowed(text: str, **arguments: Any) -> bool:
        return Held(name, kind, **arguments).accepts(text)

    one, two = ("ping", '{"n": true}'), section(name, ("get_time", "{}"), ("get_time", "{}"))
    assert allowed(section(name, one)) and not allowed("Well. " + section(name, one)), "text before"
    assert not allowed(section(name, one) + " Well."), "text after"
    assert not allowed("") and not allowed("\n"), "no call"
    assert not allowed(section(name, ("pong", "{}"))), "an unknown function"
    assert not allowed(section(name, ("ping", '{"n": 1}'))) and not allowed(section(name, ("ping", '{"m": true}')))
    assert not allowed(section(name, ("get", '{"city": "x y"}'))), "a required argument"
    assert not allowed(section(name, ("get", '{"city": "x", "unit": "C"}'))), "an enumerated value"
    assert not allowed(section(name, ("get", '{"city": "x y", "unit": "C", "note": "long"}')))
    assert not allowed(section(name, ("get", '{"city": "x y", "unit": "C", "code": "ab"}')))
    assert not allowed(section(name, one), tools=GET_TIME), "another function"
    assert allowed(two) and not allowed(two, parallel=False)


@every_kind
@every_format
def test_free_text_until_a_call(name: str, kind: Kind) -> None:
    """tool_choice auto with `strict`: text and calls are free, arguments of strict functions are not."""

    def allowed(text: str) -> bool:
        return Held(name, kind, required=False).accepts(text)

    good = section(name, ("get", '{"city": "x y", "unit": "C"}'))
    for text in ("", "<b>Well</b> é\n", good, "Let me see.\n\n" + good, " " + section(name, ("get_time", "{}"))):
        assert allowed(text)
    assert not allowed(good.replace("x y", "z")) and not allowed(section(name, ("pong", "{}")))
    assert allowed(section(name, ("ping", '{"n": [1], "m": {}}'))), "not strict: any object"
    assert not allowed(good + " and text")
    begun = BEGIN[name] + head(name, "x")
    assert not Held(name, kind, required=False).accepts("Well " + begun, to_the_end=False)


def test_a_function_of_any_arguments() -> None:
    tools = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]
    for name, kind in itertools.product(NAMES, ("special", "none")):
        assert Held(name, kind, tools).accepts(section(name, ("f", '{"a": "b", "c": [1]}')))  # type: ignore[arg-type]


def glm_accepts(schema: Any, text: str, root: dict[str, Any]) -> bool:
    parameters = {**root, "properties": {"k": schema}, "required": ["k"]}
    tools = [{"type": "function", "function": {"name": "f", "parameters": parameters}}]
    call = f"<tool_call>f\n<arg_key>k</arg_key>\n<arg_value>{text}</arg_value>\n</tool_call>"
    results = {Held("glm47", kind, tools).accepts(call) for kind in ("special", "added", "none")}  # type: ignore[arg-type]
    (result,) = results
    return result


@pytest.mark.parametrize(
    ("schema", "good", "bad"),
    [
        ({"type": "string"}, ["", 'any "text"\n</arg', "5"], []),
        ({"type": "string", "minLength": 2, "maxLength": 3.0}, ["ab", "é世x"], ["a", "abcd"]),
        ({"type": "string", "minLength": 3}, ["abc", "abc<d"], ["ab", "a<bc"]),
        ({"type": "string", "maxLength": 100_000}, ["", "<b>x</b>"], []),
        ({"type": "string", "pattern": "^[a-z]{1,64}$", "maxLength": 4000}, ["abc"], ["A"]),
        ({"type": "string", "pattern": "a/b"}, ["a/b", "xa/by\n"], ["ab"]),
        ({"type": "string", "pattern": "^a\\/?$"}, ["a", "a/"], ["ab", "ba"]),
        ({"type": "string", "pattern": "^a\\$"}, ["a$", "a$b"], ["a", "ba$"]),
        ({"type": "string", "pattern": "^[\\d-]\\w\\D$"}, ["3_x", "-aé"], ["٣_x", "3éx", "3_5"]),
        ({"type": "string", "pattern": "b\n$", "maxLength": 3}, ["ab\n"], ["aab\n", "b"]),
        ({"const": "a/"}, ["a/"], ["a", '"a/"']),
        ({"enum": ["a", 1, None]}, ["a", "1", "null"], ["2", ""]),
        ({"type": "number"}, ["1.5", "-2"], ["x", ""]),
        ({"$ref": "#/$defs/a"}, ['{"b": true}'], ["{}", "x"]),
        ({"type": "array", "items": {"$ref": "#/$defs/a"}}, ["[]", '[{"b": true}]'], ["[1]"]),
        ({"anyOf": [{"type": "string"}, {"type": "null"}]}, ["null", "x"], []),
        ({}, ["null", "x"], []),
        (True, ["null", "x"], []),
        ({"type": "string", "pattern": "^a|b$"}, ["a", "axx", "xxb"], ["xa", "bx"]),
        ({"type": "string", "pattern": "^(a|b)$"}, ["a", "b"], ["ab", "xa"]),
        ({"type": "string", "pattern": "[|^$]x"}, ["|x", "a^xb"], ["x"]),
        ({"type": "string", "format": "date"}, ["2026-11-27"], ["2026-13-01", "27.11.2026", ""]),
        ({"type": "string", "format": "date-time"}, ["2026-11-27T20:15:00Z"], ["2026-11-27"]),
        ({"type": "string", "format": "uuid"}, ["123e4567-e89b-12d3-a456-426614174000"], ["123"]),
        ({"type": "string", "format": "ipv4"}, ["10.0.0.255"], ["10.0.0.256"]),
        ({"type": "string", "format": "email"}, ["a.b@example.org"], ["a.b", "@x"]),
        ({"type": "string", "format": "hostname", "maxLength": 5}, ["a.b-c"], ["-a", "aa.bbb"]),
        ({"type": "string", "format": "color"}, ["red"], []),
        ({"$ref": "#/$defs/short"}, ["ab"], ["abc"]),
        ({"$ref": "#/$defs/short", "description": "short"}, ["ab"], ["abc"]),
        ({"allOf": [{"$ref": "#/$defs/short"}], "default": "a"}, ["ab"], ["abc"]),
        ({"anyOf": [{"enum": ["a", "b"], "type": "string"}, {"type": "null"}]}, ["a", "null"], ["c", '"a"']),
        ({"type": ["string", "null"]}, ["x", "null"], []),
        ({"type": ["integer", "null"], "maximum": 5}, ["5", "null"], ["6", "x"]),
        ({"type": "string", "enum": ["a", 1]}, ["a"], ["1"]),
        ({"type": "integer", "enum": [1, 7], "maximum": 5}, ["1"], ["7"]),
        ({"type": "boolean"}, ["true"], ["yes"]),
        ({"type": "object", "additionalProperties": {"type": "integer"}}, ['{"a": 1}'], ['{"a": "b"}', "x"]),
        ({"type": "array", "items": {"type": "string"}, "maxItems": 1}, ['["a"]'], ['["a", "b"]']),
    ],
)
def test_values_of_tagged_arguments(schema: Any, good: list[str], bad: list[str]) -> None:
    root = {
        "$defs": {
            "short": {"type": "string", "maxLength": 2},
            "a": {
                "type": "object",
                "properties": {"b": {"type": "boolean"}},
                "required": ["b"],
                "additionalProperties": False,
            },
        }
    }
    assert [glm_accepts(schema, text, root) for text in good + bad] == [True] * len(good) + [False] * len(bad)


NOT_HELD: list[tuple[Any, str]] = [
    (
        {"type": "string", "format": "uri"},
        "format: uri can't be enforced in this model's format of calls. Use a pattern",
    ),
    ({"type": "string", "pattern": "(^a|b)"}, "pattern: ^ and $ can only be enforced at the ends"),
    ({"type": "string", "pattern": 5}, "pattern"),
    ({"anyOf": [{"type": "string", "maxLength": 2}, {"type": "integer"}]}, "a string beside other values"),
    ({"type": ["string", "integer"], "maxLength": 2}, "a string beside other values"),
    ({"enum": ["a", "b"], "maxLength": 2}, "`enum` beside `maxLength`"),
    ({"$ref": "#/$defs/s", "maxLength": 2}, "`$ref` beside `maxLength`"),
    ({"allOf": [{"type": "string"}, {"maxLength": 2}]}, "`allOf` of strings"),
    ({"type": "string", "enum": [1]}, "no value satisfies it"),
    (False, "no value satisfies it"),
    ({"not": {"type": "string"}}, "`not` can't be enforced"),
    ({"anyOf": [{"type": "string", "maxLength": 1}] * 300}, "more than 256 subschemas"),
]


@pytest.mark.parametrize(("schema", "message"), NOT_HELD, ids=[message for _, message in NOT_HELD])
def test_what_is_not_held_on_tagged_arguments_is_refused_by_its_place(schema: Any, message: str) -> None:
    with pytest.raises(SchemaError) as refused:
        glm_accepts(schema, "x", {"$defs": {"s": {"type": "string"}}})
    assert refused.value.function == "f"
    assert str(refused.value).startswith("at /properties/k") and message in str(refused.value)


@pytest.mark.parametrize(
    "more",
    [
        {"anyOf": [{"required": ["a"]}, {"required": ["k"]}]},
        {"patternProperties": {"^x": {}}},
        {"minProperties": 1},
        {"enum": [{}]},
        {"$ref": "#/$defs/s"},
    ],
    ids=lambda more: next(iter(more)),
)
def test_what_is_not_held_of_all_tagged_arguments_is_refused(more: dict[str, Any]) -> None:
    with pytest.raises(SchemaError, match=f"`{re.escape(next(iter(more)))}` of all arguments"):
        glm_accepts({"type": "string"}, "x", {"$defs": {"s": {"type": "object"}}, **more})


def test_parameters_that_only_refer_to_a_definition() -> None:
    schema = {"type": "object", "properties": {"k": {"$ref": "#/$defs/n"}}, "required": ["k"]}
    parameters = {"$ref": "#/$defs/args", "$defs": {"args": schema, "n": {"type": "integer"}}}
    tools = [{"type": "function", "function": {"name": "f", "parameters": parameters}}]
    call = "<tool_call>f<arg_key>k</arg_key><arg_value>{}</arg_value></tool_call>"
    held = [Held("glm47", "none", tools).accepts(call.format(text)) for text in ("5", "x")]
    assert held == [True, False]


@pytest.mark.parametrize("length", [-1, "5}/ | /.*", True, 1.5, None])
def test_lengths_that_are_none(length: Any) -> None:
    with pytest.raises(GrammarError, match="maxLength: expected a whole number from 0 on, got '"):
        glm_accepts({"type": "string", "maxLength": length}, "", {})


def test_lengths_that_no_string_has() -> None:
    with pytest.raises(GrammarError, match="minLength: 5 is more than maxLength, 3"):
        glm_accepts({"type": "string", "minLength": 5, "maxLength": 3}, "", {})


def test_hostile_names_stay_texts() -> None:
    """Keys and values can't leave the quotes that they are written in."""
    key = 'a" | "b\n/ <[256]> %json {}'
    parameters = {"properties": {key: {"enum": [key]}}, "required": [key]}
    tools = [{"type": "function", "function": {"name": "f", "parameters": parameters}}]
    arguments = json.dumps({key: key})
    for name in NAMES:
        assert Held(name, "none", tools).accepts(section(name, ("f", arguments)))
        assert not Held(name, "none", tools).accepts(section(name, ("f", '{"b": "b"}')))


@every_format
def test_many_tools(name: str) -> None:
    """As many as a request may have, each with a few arguments."""
    properties = {f"p{i}": {"type": kind} for i, kind in enumerate(("string", "integer", "boolean", "array"))}
    tools = [
        {"type": "function", "function": {"name": f"f{i}", "parameters": {"type": "object", "properties": properties}}}
        for i in range(128)
    ]
    held = Held(name, "special", tools)
    assert held.accepts(section(name, ("f127", '{"p0": "x", "p2": true}')))


def test_ends_of_sections() -> None:
    """Negative control of `accepts`: a section without its end is allowed so far, and is no end."""
    for name in set(NAMES) - {"glm47"}:
        text = section(name, ("get_time", "{}")).removesuffix(END[name])
        assert Held(name, "special").accepts(text, to_the_end=False) and not Held(name, "special").accepts(text)
