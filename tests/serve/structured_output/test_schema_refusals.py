"""Schemas that are refused: the message says where and why, in this API's words."""

from __future__ import annotations

import re
from typing import Any

import pytest

from jax_mla_cp.serve.structured_output import JsonSchema
from jax_mla_cp.serve.structured_output.schema_check import MAX_DEPTH
from tests.serve.structured_output.walking import refusal

INTERNAL = re.compile(
    r"llguidance|coerce|lenient|Unimplemented|registry|retriev|[Nn]oExtension|verbose|SearchRegex|RegexAst|f64|secret"
)


def nested(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "integer"}
    for _ in range(depth):
        schema = {"type": "array", "items": schema}
    return schema


def inside(schema: Any) -> dict[str, Any]:
    """The schema at /properties/v, beside others that are right."""
    return {
        "type": "object",
        "properties": {"a/b": {"type": "string", "pattern": "^x"}, "v": schema, "w": {"oneOf": [{"type": "null"}]}},
        "title": "secret",
    }


OVERLAP = {"oneOf": [{"type": "number"}, {"type": "integer"}]}


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        (inside(OVERLAP), "at /properties/v: the branches of oneOf can't be told apart"),
        ({"properties": {"a~/b": OVERLAP, "c": OVERLAP}}, "at /properties/a~0~1b: the branches of oneOf"),
        ({"$defs": {"d": {"items": OVERLAP}}, "$ref": "#/$defs/d"}, "at /$defs/d/items: the branches of oneOf"),
        ({"$ref": "#"}, "it is circular"),
        ({"$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"allOf": [{"$ref": "#/$defs/a"}]}}, "$ref": "#/$defs/a"}, "circular"),
        (inside({"$ref": "#/properties/v"}), "at /properties/v: $ref leads back here"),
        (inside({"$ref": "https://example.com/s"}), "at /properties/v: $ref to another document is not followed"),
        ({"$ref": "file:///etc/passwd"}, "$ref to another document is not followed"),
        (inside({"$ref": "#/$defs/x"}), "at /properties/v: $ref: nothing is at #/$defs/x"),
        (inside({"$ref": "#x"}), "at /properties/v: $ref: nothing is where it points"),
        (inside({"$ref": 5}), "at /properties/v: $ref: expected a string"),
        ({"$schema": "http://example.com/meta", "type": "null"}, "$schema or $ref names a document"),
        *(
            (inside({word: {"type": "null"}}), f"at /properties/v: `{word}` can't be enforced")
            for word in ("not", "if", "contains", "propertyNames", "dependentSchemas", "unevaluatedProperties")
        ),
        # Not a keyword in this draft, so it would silently assert nothing
        ({"$schema": "http://json-schema.org/draft-07/schema#", "dependentRequired": {"a": ["b"]}}, "`dependentRequired`"),
        (inside({"type": "array", "uniqueItems": True}), "`uniqueItems` can't be enforced"),
        (inside({"type": "foo"}), "at /properties/v: type: must be null, boolean"),
        (inside({"type": 5}), "at /properties/v: type: must be"),
        (inside({"type": "object", "properties": 5}), "at /properties/v: properties: expected an object of schemas"),
        (inside({"anyOf": {}}), "at /properties/v: anyOf: expected a list"),
        (inside({"anyOf": [5]}), "at /properties/v/anyOf/0: expected a schema"),
        (inside({"additionalProperties": "x"}), "at /properties/v/additionalProperties: expected a schema"),
        (inside({"enum": 5}), "at /properties/v: enum: a value of the wrong type"),
        (inside({"minLength": -1}), "at /properties/v: minLength: a value of the wrong type"),
        (inside({"minimum": "1"}), "at /properties/v: minimum: a value of the wrong type"),
        (inside({"required": "a"}), "at /properties/v: required: a value of the wrong type"),
        (inside({"type": "integer", "minimum": 2**53 + 1}), "at /properties/v: minimum: not held exactly beyond 2**53"),
        (inside({"type": "integer", "multipleOf": 0}), "at /properties/v: multipleOf"),
        (inside({"type": "number", "multipleOf": 1e-300}), "at /properties/v: multipleOf"),
        (inside({"pattern": "(secret"}), "at /properties/v: pattern: unclosed group"),
        (inside({"pattern": r"\bsecret"}), "at /properties/v: pattern: \\b and other look-around"),
        ({"properties": {"a": {"type": "object", "patternProperties": {"^a": {}, "b": {}}}}}, "at /properties/a: the patterns"),
        (inside({"properties": {"a": True}, "minProperties": 2}), "at /properties/v: minProperties and maxProperties"),
        ({"enum": []}, "no value satisfies it"),
        ({"type": "object", "properties": {"x": {"$ref": "#"}}, "required": ["x"]}, "it has to contain itself without end"),
        (inside({"$defs": {"l": {"type": "array", "items": {"$ref": "#/properties/v/$defs/l"}, "minItems": 1}},
                 "$ref": "#/properties/v/$defs/l"}), "at /properties/v: no value satisfies it: it has to contain itself"),
        ({"allOf": [{"type": "string"}, {"type": "integer"}]}, "at /allOf/1: no value satisfies it: its parts ask for different"),
        ({"type": "integer", "minimum": 5, "maximum": 3}, "a lower limit exceeds an upper one"),
        ({"type": "string", "pattern": "^secret$", "minLength": 9}, "its pattern, format and lengths exclude one another"),
        ({"properties": {"a": False}, "required": ["a"], "type": "object"}, "at /properties/a: no value satisfies it, but the"),
        ({"type": "string", "allOf": [{"pattern": f"{i}"} for i in range(9)]}, "more than 8 patterns at once"),
        (nested(MAX_DEPTH), "nested too deeply; the limit is 64 levels"),
        ({"enum": ["a" * 70_000]}, "characters long; the limit is 65536"),
        ({"const": float("inf")}, "a number that is infinite"),
        ({"const": "\ud800"}, "not Unicode"),
    ],
)  # fmt: skip
def test_messages(schema: dict[str, Any], message: str) -> None:
    found = refusal(schema)
    assert message in found
    assert not INTERNAL.search(found) and len(found) <= 500 and "\n" not in found


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"a":', "not valid JSON: Expecting value at character 5"),
        ("[]", "must be a JSON object"),
        ('{"const": NaN}', "infinite"),
        ('{"const": 1e999}', "infinite"),
        ('{"const": ' + "9" * 5000 + "}", "too long"),
        ('{"items":' * 7000 + "{}" + "}" * 7000, "characters long"),
        ('{"items":' * 500 + "{}" + "}" * 500, "nested too deeply"),
        ('{"const": "\\ud800"}', "not Unicode"),
        ('{"type": "foo"}', "type: must be"),
    ],
)
def test_messages_for_a_schema_as_text(text: str, message: str) -> None:
    assert message in refusal(JsonSchema(text))


def test_what_contains_itself_but_not_always() -> None:
    node = {
        "type": "object",
        "properties": {"next": {"anyOf": [{"$ref": "#"}, {"type": "null"}]}},
        "required": ["next"],
    }
    assert refusal(node) == ""
    assert refusal({"type": "object", "properties": {"next": {"$ref": "#"}}}) == ""
    assert refusal({"type": ["object", "null"], "properties": {"next": {"$ref": "#"}}, "required": ["next"]}) == ""
    assert refusal({"type": "array", "items": {"$ref": "#"}}) == ""


def test_what_nothing_refers_to_is_not_refused() -> None:
    assert refusal({"$defs": {"unused": {"not": {}}}, "type": "string"}) == ""
