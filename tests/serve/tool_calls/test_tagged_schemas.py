"""GLM's tagged arguments: what the grammar lets the model write is read as a value that the schema allows, or the schema is refused."""

from __future__ import annotations

import json
from typing import Any

import jsonschema
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from jax_mla_cp.serve.structured_output.grammars import MAX_OWN_TEXT
from jax_mla_cp.serve.tool_calls import SchemaError
from jax_mla_cp.serve.tool_calls.schema_types import argument_types
from tests.serve.tool_calls.formats import read
from tests.serve.tool_calls.test_grammar import Held

DEFINITIONS: dict[str, Any] = {
    "word": {"type": "string", "maxLength": 2},
    "count": {"type": "integer", "minimum": 3},
    "either": {"type": ["string", "integer"]},
    "tree": {
        "type": "object",
        "properties": {"of": {"type": "array", "items": {"$ref": "#/$defs/tree"}}},
        "additionalProperties": False,
    },
}
TEXTS = [
    "",
    "a",
    "abc",
    "1",
    "5",
    "2.5",
    "null",
    "true",
    "True",
    '"a"',
    "[]",
    "[1]",
    "{}",
    '{"a": 1}',
    '{"of": [{}]}',
    " 5 ",
]


def in_function(schema: Any) -> dict[str, Any]:
    return {"type": "object", "properties": {"k": schema}, "required": ["k"], "$defs": DEFINITIONS}


def argument(parameters: dict[str, Any], text: str) -> Any:
    """The arguments as read from a call whose only argument is `text`; None if the grammar forbids it."""
    tools = [{"type": "function", "function": {"name": "f", "parameters": parameters}}]
    call = f"<tool_call>f\n<arg_key>k</arg_key>\n<arg_value>{text}</arg_value>\n</tool_call>"
    if not Held("glm47", "none", tools).accepts(call):
        return None
    ((_, arguments),) = read("glm47", [call], tools).calls
    return json.loads(arguments)


WORDS: dict[str, st.SearchStrategy[Any]] = {
    "minimum": st.just(4),
    "maximum": st.just(4),
    "minLength": st.just(2),
    "maxLength": st.just(2),
    "pattern": st.sampled_from(["^[0-9]$", "a|b", "^a|1$"]),
    "format": st.sampled_from(["date", "color"]),
    "items": st.sampled_from([{}, {"type": "string"}]),
    "properties": st.just({"a": {"type": "string"}}),
    "required": st.sampled_from([[], ["of"]]),
    "additionalProperties": st.booleans(),
    "description": st.just("a"),
    "enum": st.lists(
        st.sampled_from(["a", "1", "null", "true", 1, 2.5, None, True, False, []]), min_size=1, max_size=3
    ),
    "const": st.sampled_from(["5", 5, None, True]),
    "$ref": st.sampled_from([f"#/$defs/{name}" for name in DEFINITIONS]),
}
TYPE_NAMES = st.sampled_from(["null", "boolean", "integer", "number", "string", "array", "object"])
TYPE = st.fixed_dictionaries(
    {}, optional={"type": TYPE_NAMES | st.lists(TYPE_NAMES, min_size=1, max_size=3, unique=True)}
)
SCHEMAS = st.recursive(
    st.builds(
        lambda kind, words: {**kind, **words},
        TYPE,
        st.lists(st.sampled_from(sorted(WORDS)), max_size=2, unique=True).flatmap(
            lambda names: st.fixed_dictionaries({name: WORDS[name] for name in names})
        ),
    ),
    lambda inner: st.builds(
        lambda kind, word, parts: {**kind, word: parts},
        TYPE,
        st.sampled_from(["anyOf", "oneOf", "allOf"]),
        st.lists(inner, min_size=1, max_size=2),
    ),
    max_leaves=3,
)


@settings(deadline=None, max_examples=150, derandomize=True)
@given(schema=SCHEMAS, texts=st.lists(st.sampled_from(TEXTS), min_size=3, max_size=5, unique=True))
@example({"type": ["string", "integer"], "maximum": 4}, ["5"])
@example({"minimum": 4}, ["1"])
@example({"properties": {"a": {"type": "string"}}}, ['{"a": 1}'])
@example({"anyOf": [{"type": "string"}, {"enum": [1]}]}, ["5"])
@example({"anyOf": [{"type": "string"}, {"type": "object", "required": ["of"]}]}, ["{}"])
@example({"enum": ["1", 5]}, ["1"])
@example({"type": ["string", "null"], "enum": ["null"]}, ["null"])
@example({"type": ["string", "integer"], "anyOf": [{"type": "string", "pattern": "^[0-9]$"}]}, ["5"])
@example({"$ref": "#/$defs/either", "minimum": 4}, ["1"])
@example({"anyOf": [{"type": "string"}, {"allOf": [{}, {"type": "null"}]}]}, ["1"])
@example({"anyOf": [{"type": "string"}, {"oneOf": [{"type": "number"}, {"type": "integer"}]}]}, ["1"])
def test_what_is_written_is_read_as_the_schema_allows(schema: Any, texts: list[str]) -> None:
    parameters = in_function(schema)
    for text in texts:
        try:
            found = argument(parameters, text)
        except (SchemaError, AssertionError):  # the latter: llguidance refuses the grammar
            return
        if found is not None:
            jsonschema.validate(found, parameters)


def test_texts_that_a_schema_forbids_are_among_those_tried() -> None:
    """Negative control of the test above: its texts have values that limits exclude, and the check finds them."""
    for schema, text in (({"type": "integer", "minimum": 4}, "1"), ({"type": "string", "maxLength": 2}, "abc")):
        assert text in TEXTS and argument(in_function(schema), text) is None
        value = json.loads(text) if schema["type"] == "integer" else text
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate({"k": value}, in_function(schema))


@pytest.mark.parametrize(
    ("schema", "values"),
    [
        (
            {"anyOf": [{"type": "string", "format": "date"}, {"type": "null"}]},
            {"2026-11-27": "2026-11-27", "null": None},
        ),
        ({"type": ["string", "null"], "maxLength": 2}, {"ab": "ab", "null": None}),
        ({"anyOf": [{"type": "string", "maxLength": 1}, {"const": "long"}]}, {"a": "a", "long": "long"}),
        ({"type": "string", "enum": ["1", "null"], "readOnly": True}, {"1": "1", "null": "null"}),
        ({"anyOf": [{"type": "string"}, {"type": "object", "additionalProperties": True}]}, {"a": "a", "{}": {}}),
        ({"allOf": [{"type": "integer"}, {"minimum": 4}]}, {"5": 5}),
        ({"$ref": "#/$defs/tree"}, {'{"of": [{}]}': {"of": [{}]}}),
        ({"type": "array", "items": {"$ref": "#/$defs/count"}, "$defs": {"count": {"type": "null"}}}, {"[5]": [5]}),
    ],
    ids=json.dumps,
)
def test_what_may_be_written(schema: Any, values: dict[str, Any]) -> None:
    for text, value in values.items():
        assert argument(in_function(schema), text) == {"k": value}
    forbidden = {"type": "array", "items": {"$ref": "#/$defs/count"}}
    assert argument(in_function({**schema, **forbidden} if "items" in schema else forbidden), "[null]") is None


def test_references_into_other_arguments() -> None:
    """As zod-to-json-schema writes them."""
    place = {
        "type": "object",
        "properties": {"x": {"type": "integer"}},
        "required": ["x"],
        "additionalProperties": False,
    }
    parameters = {
        "type": "object",
        "properties": {"a": place, "k": {"type": "array", "items": {"$ref": "#/properties/a"}}},
        "required": ["k"],
    }
    assert argument(parameters, '[{"x": 1}]') == {"k": [{"x": 1}]} and argument(parameters, "[1]") is None


def test_parameters_behind_a_reference_are_read_by_their_types() -> None:
    parameters = {"$ref": "#/$defs/a", "$defs": {"a": in_function({"type": "string"})}}
    assert argument_types(parameters, "k") == {"string"} and argument(parameters, "5") == {"k": "5"}
    assert argument({"type": "object", "$ref": "#/$defs/a", "$defs": {"a": True}}, "5") == {"k": 5}


def test_required_arguments_without_a_schema_of_their_own() -> None:
    parameters = {"type": "object", "required": ["k"], "additionalProperties": {"type": "integer"}}
    assert argument(parameters, "5") == {"k": 5} and argument(parameters, "x") is None


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"required": ["k"], "additionalProperties": False}, "at /properties/k: no value satisfies it"),
        ({"$ref": "#/$defs/a", "$defs": {"a": False}}, r"at /\$defs/a: no value satisfies it"),
        ({"$ref": "#/$defs/a", "$defs": {"a": in_function({"type": 5})}}, r"at /\$defs/a/properties/k: type: must be"),
        (in_function({"type": 5}), "at /properties/k: type: must be"),
        (in_function({"type": [["string"]]}), "at /properties/k: type: must be"),
        (in_function({"type": ["string", "wish"]}), "at /properties/k: type: must be"),
        (in_function({"type": "string", "pattern": {}}), "pattern: expected a string"),
        (in_function({"type": ["string", "array"], "minItems": {}}), "a string beside other values"),
        (
            in_function({"anyOf": [{"const": "a"}, {"allOf": [{"enum": [1, 2]}, {"const": 2}]}]}),
            "a string beside other values",
        ),
        (in_function({"type": "string", "pattern": "a)|(b"}), "pattern: its parentheses don't match"),
        (in_function({"type": "string", "pattern": "^(?i)a$|^b$"}), r"pattern: flags such as \(\?i\)"),
        (in_function({"enum": ["a</arg_value>b"]}), "a value with </arg_value> in it can't be written"),
        (in_function({"enum": ["1", 1]}), "the listed value '?1'? can't be told from one of another type"),
        (in_function({"type": "array", "items": {"$ref": "#there"}}), r"\$ref: only pointers into `parameters`"),
        (in_function({"$id": "http://a.b/c", "type": "string"}), r"`\$id` inside of a schema can't be enforced"),
        ({"properties": {" k": {"type": "integer"}}}, "its name can't be written"),
        ({"properties": {"a</arg_key>": {"type": "integer"}}}, "its name can't be written"),
    ],
)
def test_what_can_not_be_written_or_read_is_refused(parameters: dict[str, Any], message: str) -> None:
    with pytest.raises(SchemaError, match=message):
        argument(parameters, "x")


def test_the_grammar_stays_short_however_much_is_referred_to() -> None:
    """Each argument has a copy of what it refers to."""
    big = {"enum": list(range(8000))}
    properties = {f"p{i}": {"$ref": "#/$defs/big"} for i in range(200)}
    with pytest.raises(SchemaError, match=f"more than {MAX_OWN_TEXT} characters long"):
        argument({"type": "object", "properties": properties, "$defs": {"big": big}}, "x")
    few = {"type": "object", "properties": {"k": {"$ref": "#/$defs/big"}}, "required": ["k"], "$defs": {"big": big}}
    assert argument(few, "7999") == {"k": 7999}
