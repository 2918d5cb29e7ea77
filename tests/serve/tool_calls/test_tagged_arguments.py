"""GLM's tagged arguments become JSON of the types that the schema allows."""

from __future__ import annotations

import json
from typing import Any

import pytest

from jax_mla_cp.serve.tool_calls.schema_types import MAX_PARTS, argument_types
from tests.serve.tool_calls.formats import read, read_both

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "text": {"type": "string"},
        "count": {"type": "integer"},
        "ratio": {"type": "number"},
        "flag": {"type": "boolean"},
        "items": {"type": "array"},
        "thing": {"type": "object"},
        "maybe": {"anyOf": [{"type": "string"}, {"type": "null"}]},
        "mixed": {"type": ["string", "integer"]},
        "unit": {"enum": ["1", "C"]},
        "city": {"$ref": "#/$defs/City"},
        "free": {},
        "yes": True,
    },
    "$defs": {"City": {"allOf": [{"$ref": "#/$defs/Name"}]}, "Name": {"type": "string", "minLength": 1}},
}
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": SCHEMA}}]


def value_of(key: str, text: str) -> str:
    """The JSON text of an argument, whole and streamed."""
    call = f"<tool_call>f\n<arg_key>{key}</arg_key>\n<arg_value>{text}</arg_value>\n</tool_call>"
    whole, streamed = read("glm47", [call], TOOLS), read("glm47", call, TOOLS)
    assert whole.calls == streamed.calls and not whole.is_incomplete
    ((_, arguments),) = whole.calls
    assert list(json.loads(arguments, parse_int=str)) == [key]
    return arguments.removeprefix(f'{{"{key}": ').removesuffix("}")


@pytest.mark.parametrize(
    ("key", "text", "expected"),
    [
        ("text", "5", '"5"'),
        ("text", "null", '"null"'),
        ("text", "", '""'),
        ("text", ' "q" \\ \n\t</arg_key><tool_call> é😀', '" \\"q\\" \\\\ \\n\\t</arg_key><tool_call> é😀"'),
        ("text", "</arg_valu", '"</arg_valu"'),
        ("city", "5", '"5"'),
        ("unit", "1", '"1"'),
        ("count", " 5 ", "5"),
        ("count", "9" * 5000, "9" * 5000),
        ("count", "five", '"five"'),
        ("ratio", "1.50e3", "1.50e3"),
        ("ratio", "NaN", '"NaN"'),
        ("flag", "true", "true"),
        ("flag", "True", "true"),
        ("items", '\n[1, {"a": "</tool_call>"} ] ', '[1, {"a": "</tool_call>"} ] '),
        ("items", "  ", '""'),
        ("items", "x", '"x"'),
        ("thing", '{"a": {}}', '{"a": {}}'),
        ("maybe", "null", "null"),
        ("maybe", "nul", '"nul"'),
        ("maybe", "nullify", '"nullify"'),
        ("maybe", "", '""'),
        ("mixed", "5", "5"),
        ("mixed", "5a ", '"5a "'),
        ("mixed", "null", '"null"'),
        ("mixed", '"5"', '"\\"5\\""'),
        ("free", "5", "5"),
        ("free", "a b\n", '"a b\\n"'),
        ("free", '"a"', '"a"'),
        ("free", "[1", '"[1"'),
        ("free", "[" * 20_000, '"' + "[" * 20_000 + '"'),
        ("free", "Infinity", '"Infinity"'),
        ("yes", "[1]", "[1]"),
        ("unknown", "1", "1"),
    ],
)
def test_values(key: str, text: str, expected: str) -> None:
    assert value_of(key, text) == expected


def test_glm45_writes_lines() -> None:
    text = "\n<tool_call>f\n<arg_key>text</arg_key>\n<arg_value>a</arg_value>\n<arg_key>count</arg_key>\n<arg_value>2</arg_value>\n</tool_call>"
    assert read_both("glm47", text).calls == [("f", '{"text": "a", "count": 2}')]
    assert read_both("glm47", "\n<tool_call>f\n</tool_call>").calls == [("f", "{}")]


def test_broken_pairs() -> None:
    """Text between arguments is dropped, and so is a key without a value."""
    text = (
        "<tool_call>f<arg_key>a</arg_key>,<arg_key> count </arg_key>:<arg_value>2</arg_value> and "
        '<arg_key>é"</arg_key><arg_value>x</arg_value><arg_key>b</tool_call> after'
    )
    found = read_both("glm47", text)
    assert found.calls == [("f", '{"count": 2, "é\\"": "x"}')] and found.content == " after"


def test_a_value_without_an_end() -> None:
    found = read("glm47", ["<tool_call>f<arg_key>text</arg_key><arg_value>half</tool_call>"], TOOLS)
    assert found.is_incomplete and found.calls == [("f", '{"text": "half</tool_call>')]
    found = read("glm47", ["<tool_call>f<arg_key>count</arg_key><arg_value>12"], TOOLS)
    assert found.is_incomplete and found.calls == [("f", '{"count": ')], "a number may go on"


@pytest.mark.parametrize(
    ("schema", "types"),
    [
        ({"type": "string"}, {"string"}),
        ({"type": "number"}, {"number", "integer"}),
        ({"type": ["string", "null"]}, {"string", "null"}),
        (
            {"enum": ["a", 1, None, 1.5, True, [], {}]},
            {"string", "integer", "null", "number", "boolean", "array", "object"},
        ),
        ({"const": "a"}, {"string"}),
        ({"oneOf": [{"type": "string"}, {"$ref": "#/$defs/a"}]}, {"string", "object"}),
        ({"$ref": "#/$defs/loop"}, {"null"}),
        ({"$ref": "#/$defs/a~1b"}, {"array"}),
        ({"$ref": "#/$defs/none"}, None),
        ({"$ref": "http://127.0.0.1/x"}, None),
        ({"anyOf": [{"type": "string"}, {}]}, None),
        ({"anyOf": "x"}, None),
        ({"enum": []}, None),
        ({"enum": list(range(MAX_PARTS + 1))}, None),
        ({"anyOf": [{"type": "string"}] * (MAX_PARTS - 1)}, {"string"}),
        ({"anyOf": [{"type": "string"}] * MAX_PARTS}, None),
        (True, None),
        (7, None),
    ],
)
def test_types_of_schemas(schema: Any, types: set[str] | None) -> None:
    loop = {"anyOf": [{"$ref": "#/$defs/loop"}, {"type": "null"}]}
    root = {"properties": {"k": schema}, "$defs": {"a": {"type": "object"}, "loop": loop, "a/b": {"type": "array"}}}
    found = argument_types(root, "k")
    assert found == types if types is None else found == frozenset(types)
    assert argument_types(root, "other") is None and argument_types({"properties": 5}, "k") is None
