"""Which answers a schema allows."""

from __future__ import annotations

import json
from typing import Any

import jsonschema
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from llguidance import LLMatcher

from jax_mla_cp.serve.structured_output import ANY_OBJECT, JsonSchema
from jax_mla_cp.serve.structured_output.schema_check import ENFORCED_FORMATS
from tests.helpers.byte_tokenizer import EOS
from tests.serve.structured_output.walking import GRAMMARS, accepts, allowed, refusal

UNION = {
    "$defs": {
        "cat": {
            "type": "object",
            "properties": {"kind": {"const": "cat"}, "lives": {"type": "integer"}},
            "required": ["kind"],
        },
        "dog": {"type": "object", "properties": {"kind": {"enum": ["dog", "wolf"]}}, "required": ["kind"]},
    },
    "oneOf": [{"$ref": "#/$defs/cat"}, {"$ref": "#/$defs/dog"}, {"type": "null"}],
    "discriminator": {"propertyName": "kind"},
}


@pytest.mark.parametrize(
    ("schema", "yes", "no"),
    [
        ({"type": "integer", "minimum": 3, "maximum": 12}, ["3", "12"], ["2", "13", "3.0"]),
        ({"type": "number", "minimum": 1, "exclusiveMaximum": 2.0}, ["1", "1.5"], ["2", "0.9"]),
        ({"type": "integer", "multipleOf": 5}, ["10"], ["11"]),
        ({"type": "string", "minLength": 2.0, "maxLength": 3.0}, ['"é世"', '"abc"'], ['"a"', '"abcd"']),
        ({"type": "string", "pattern": "^a$|^b"}, ['"a"', '"bc"'], ['"ab"', '"xb"']),
        ({"type": "array", "items": {"type": "null"}, "minItems": 1, "maxItems": 2}, ["[null]"], ["[]", "[null,null,null]"]),
        ({"enum": [1, "a", None, {"b": [1]}]}, ["1", '"a"', "null", '{"b": [1]}'], ["2", '"b"']),
        ({"properties": {"a": {"type": "integer"}}}, ['{"a":1}', "5", '{"b":"x"}'], ['{"a":"x"}']),
        ({"type": "object", "additionalProperties": {"type": "integer"}}, ['{"x": 1, "y": 2}', "{}"], ['{"x": "1"}']),
        ({"type": ["string", "null"], "format": "date"}, ["null", '"2024-02-29"'], ['"2024-02-30"']),
        ({"$ref": "#/definitions/n", "definitions": {"n": {"$anchor": "x", "type": "integer"}}}, ["1"], ['"1"']),
        ({"components": {"n": {"type": "string", "format": "iri"}}, "$ref": "#/components/n"}, ['"1"'], ["1"]),
        ({"type": "object", "properties": {"next": {"$ref": "#"}}}, ['{"next": {"next": {}}}'], ['{"next": 1}']),
        (UNION, ['{"kind":"cat","lives":9}', '{"kind":"wolf"}', "null"], ['{"kind":"bird"}', '{"lives":9}']),
        # Assertions that assert nothing, and annotations
        ({"type": "array", "uniqueItems": False, "unevaluatedItems": True}, ["[1,1]"], ["{}"]),
        ({"type": "object", "propertyNames": {"type": "string"}, "dependentRequired": {}}, ['{"a":1}'], ["1"]),
        ({"type": "string", "title": "t", "deprecated": True, "x-order": 1, "nullable": True}, ['"a"'], ["null"]),
        ({"type": "integer", "format": "int32"}, ["7"], ['"7"']),
        # White space: at most 32 characters of it
        ({"type": "array"}, [f"[1,{' ' * 32}2]", "[ 1\n,\t2]"], [f"[1,{' ' * 33}2]", " []"]),
        # A client can't turn the enforcement off
        ({"oneOf": [{"type": "string"}, {"type": "null"}], "x-guidance": {"lenient": True, "nonsense": 1}}, ["null"], ["1"]),
    ],
)  # fmt: skip
def test_answers(schema: dict[str, Any], yes: list[str], no: list[str]) -> None:
    for text in yes:
        assert accepts(schema, text), text
        assert accepts(JsonSchema(json.dumps(schema)), text), text
    for text in no:
        assert not accepts(schema, text), text


def test_any_object() -> None:
    assert accepts(ANY_OBJECT, '{"a": [1, {"b": null}]}') and accepts(ANY_OBJECT, "{}")
    assert not accepts(ANY_OBJECT, "[]") and not accepts(ANY_OBJECT, '"a"')


@pytest.mark.parametrize("wrap", [lambda s: s, lambda s: {"items": {"properties": {"a": s}}}, lambda s: {"anyOf": [s]}])
def test_unknown_formats_are_annotations_at_every_depth(wrap: Any) -> None:
    assert refusal(wrap({"type": "string", "format": "int-or-string"})) == ""
    assert refusal(wrap({"format": "regex"})) == ""
    assert refusal(wrap({"type": "string", "format": 5})) != ""


OTHER_FORMATS = (
    *(
        "idn-email",
        "idn-hostname",
        "iri",
        "iri-reference",
        "json-pointer",
        "password",
        "regex",
        "relative-json-pointer",
    ),
    *("uri-reference", "uri-template", "byte", "binary", "int64", "double", "ulid"),
)


def test_every_format_that_can_be_enforced_is() -> None:
    for name in ENFORCED_FORMATS:
        assert not accepts({"type": "string", "format": name}, '"?"'), name
    for name in OTHER_FORMATS:
        grammar = LLMatcher.grammar_from_json_schema(json.dumps({"type": "string", "format": name}))
        assert "Unknown format" in LLMatcher.validate_grammar(grammar), f"{name} could be enforced"
        assert accepts({"type": "string", "format": name}, '"?"'), name


_LEAVES: st.SearchStrategy[dict[str, Any]] = st.one_of(
    st.builds(lambda low, n: {"type": "integer", "minimum": low, "maximum": low + n}, st.integers(-200, 200), st.integers(0, 90)),
    st.builds(lambda n, m: {"type": "string", "minLength": n, "maxLength": n + m}, st.integers(0, 3), st.integers(0, 3)),
    st.builds(lambda word: {"enum": [word, 1.5, None]}, st.text(max_size=3).filter(str.isprintable)),
    st.sampled_from([{"type": "boolean"}, {"type": "string", "pattern": "^[a-c]+-?$"}, {"format": "date", "type": "string"}]),
)  # fmt: skip
_SCHEMAS = st.recursive(
    _LEAVES,
    lambda inner: st.one_of(
        st.builds(lambda s, n: {"type": "array", "items": s, "maxItems": n}, inner, st.integers(0, 2)),
        st.builds(
            lambda a, b, required: {
                "type": "object",
                "properties": {"a": a, "b": b},
                "required": required,
                "additionalProperties": False,
            },
            inner,
            inner,
            st.lists(st.sampled_from(["a", "b"]), unique=True),
        ),
        st.builds(lambda a, b: {"anyOf": [a, b]}, inner, inner),
    ),
    max_leaves=6,
)


@settings(max_examples=60, deadline=None)
@given(schema=_SCHEMAS, seed=st.integers(0, 2**32))
def test_any_walk_conforms(schema: dict[str, Any], seed: int) -> None:
    """The library jsonschema agrees."""
    grammar, said, rng = GRAMMARS.compile(JsonSchema(schema)), b"", np.random.default_rng(seed)
    while not grammar.finished:
        # White space could go on for long.
        tokens = [token for token in allowed(grammar) if token not in (*b" \t\r\n",)]
        token = EOS if EOS in tokens else int(rng.choice(tokens))
        if token != EOS:
            said += bytes([token])
        grammar.accept(token)
    jsonschema.validate(json.loads(said), schema)
