"""Grammar rules of GLM's tagged arguments."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Mapping
from typing import Any

from jax_mla_cp.engine import GrammarError
from jax_mla_cp.serve.structured_output.lark import quoted
from jax_mla_cp.serve.structured_output.schema_tree import at, escaped
from jax_mla_cp.serve.tool_calls.lark import Grammar, json_value
from jax_mla_cp.serve.tool_calls.raw_string import WORDS, raw_string
from jax_mla_cp.serve.tool_calls.schema_types import MAX_PARTS, json_type, referred
from jax_mla_cp.serve.tool_calls.tagged_arguments import KEY, KEY_END, VALUE, VALUE_END

_DEFINITIONS = ("$defs", "definitions")
_UNHELD = ("$ref", "allOf", "anyOf", "oneOf", "enum", "const", "patternProperties", "minProperties", "maxProperties")
"""Keywords of a schema about all arguments together."""
_STRING_WORDS = WORDS | {"type", "enum", "const", "$ref", "anyOf", "oneOf", "allOf"}
_NO_ASSERTIONS = frozenset({"title", "description", "default", "examples", "deprecated", "$comment"})
_TYPES = ("null", "boolean", "number", "string", "array", "object")
_MAX_REFERENCES = 8


def add_pairs(grammar: Grammar, prefix: str, parameters: Mapping[str, Any]) -> str:
    """Adds rules for a function's arguments, in the schema's order, and returns what stands for them.

    Strings are raw text, all other values JSON. A schema without `properties` allows any pairs.

    Args:
      parameters: the function's schema, prepared.

    Raises:
      GrammarError: the schema says something that can't be enforced on tagged arguments.
    """
    root, parameters = parameters, _followed(parameters)
    if said := [word for word in _UNHELD if word in parameters]:
        raise GrammarError(
            f"`{said[0]}` of all arguments can't be enforced in this model's format of calls, which tags each of them. State "
            "`properties` and `required`."
        )
    properties, required = parameters.get("properties", {}), parameters.get("required", [])
    if not isinstance(required, list) or not all(isinstance(key, str) for key in required):
        raise GrammarError("required: expected a list of names. Correct it.")
    if not properties and not required:
        return _any_pairs(grammar, prefix, parameters.get("additionalProperties", True))
    pairs = []
    for i, key in enumerate(dict.fromkeys([*properties, *required])):
        try:
            value = _value(grammar, f"{prefix}_v{i}", properties.get(key, True), root)
        except GrammarError as error:
            raise at(f"/properties/{escaped(key)}", str(error)) from error
        name = f"{grammar.marker(KEY)} {quoted(key)} {grammar.marker(KEY_END)}"
        pair = grammar.rule(f"{prefix}_p{i}", f"GAP {name} GAP {grammar.marker(VALUE)} {value}")
        pairs.append(pair if key in required else f"{pair}?")
    return " ".join(pairs)


def _followed(parameters: Mapping[str, Any]) -> Mapping[str, Any]:
    """Follows a schema that does nothing but refer to one of its definitions, as some generators write it."""
    found: Any = parameters
    for _ in range(_MAX_REFERENCES):
        if set(found) & {*_UNHELD, "properties", "required", "additionalProperties"} != {"$ref"}:
            break
        found = referred(found["$ref"], parameters)
    return found if isinstance(found, Mapping) else {}


def _any_pairs(grammar: Grammar, prefix: str, values: Any) -> str:
    if values is False:
        return ""
    if values not in (True, {}):
        raise GrammarError("`additionalProperties` with a schema can't be enforced in this model's format of calls.")
    key = grammar.up_to(f"{prefix}_key", KEY_END, body="/[^<>]{1,64}/")
    value = grammar.up_to(f"{prefix}_text", VALUE_END)
    pair = grammar.rule(f"{prefix}_pair", f"{grammar.marker(KEY)} {key} GAP {grammar.marker(VALUE)} {value}")
    return f"(GAP {pair})*"


def _value(grammar: Grammar, name: str, schema: Any, root: Mapping[str, Any]) -> str:
    """Adds rules for a value up to and with its end marker, and returns what stands for them."""
    branches = list(_branches(schema, root, itertools.count()))
    if not branches:
        raise GrammarError("no value satisfies it.")
    if not any(branch["type"] == "string" for branch in branches):
        definitions = {word: root[word] for word in _DEFINITIONS if word in root}
        return f"{json_value({**definitions, **schema})} {grammar.marker(VALUE_END)}"
    if all("enum" in branch for branch in branches):
        values = [value for branch in branches for value in branch["enum"]]
        texts = [value if isinstance(value, str) else json.dumps(value) for value in values]
        return f"({' | '.join(map(quoted, dict.fromkeys(texts)))}) {grammar.marker(VALUE_END)}"
    bodies = [raw_string(branch) for branch in branches if branch["type"] == "string" and "enum" not in branch]
    if None in bodies:  # any text is a string
        return grammar.up_to(name, VALUE_END)
    if len(branches) == 1 and bodies[0] is not None:
        return grammar.up_to(name, VALUE_END, bodies[0])
    raise GrammarError(
        "a string with limits beside other values can't be enforced in this model's format of calls. Allow any string, or the "
        "string alone."
    )


def _branches(schema: Any, root: Mapping[str, Any], visits: Iterator[int]) -> Iterator[dict[str, Any]]:
    """The schema as a union of schemas of one `type`, or of finitely many values: those have `enum`.

    Raises:
      GrammarError: it has too many parts, or says something about strings that can't be enforced on raw text.
    """
    if next(visits) >= MAX_PARTS:
        raise GrammarError(f"more than {MAX_PARTS} subschemas for one argument. Simplify it.")
    if not isinstance(schema, Mapping):
        schema = {} if schema else {"enum": []}
    said = {word: value for word, value in schema.items() if word in _STRING_WORDS}
    for word in ("$ref", "anyOf", "oneOf", "allOf"):
        if word in said:
            yield from _combined(word, said, root, visits)
            return
    if "enum" in said or "const" in said:
        yield from _listed(schema)
        return
    named = said.get("type", _TYPES)
    for name in [named] if isinstance(named, str) else named:
        finite: Mapping[str, list[Any]] = {"null": [None], "boolean": [True, False]}
        yield {**said, "type": name, **({"enum": finite[name]} if name in finite else {})}


def _combined(
    word: str, said: Mapping[str, Any], root: Mapping[str, Any], visits: Iterator[int]
) -> Iterator[dict[str, Any]]:
    parts = [referred(said[word], root)] if word == "$ref" else said[word]
    found = [branch for part in parts for branch in _branches(part, root, visits)]
    if "type" in said:
        found = [branch for branch in found if _is_type(branch["type"], said["type"])]
    if any(branch["type"] == "string" for branch in found):
        if others := set(said) - {word, "type"}:
            raise GrammarError(f"`{word}` beside `{min(others)}` can't be enforced in this model's format of calls.")
        if word in ("oneOf", "allOf") and len(parts) > 1:
            raise GrammarError(f"`{word}` of strings can't be enforced in this model's format of calls. Use anyOf.")
    yield from found


def _listed(schema: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    values = [schema["const"]] if "const" in schema else schema["enum"]
    if not isinstance(values, list):
        raise GrammarError("enum: expected a list. Correct it.")
    if "type" in schema:
        values = [value for value in values if _is_type(json_type(value), schema["type"])]
    has_strings = any(isinstance(value, str) for value in values)
    if has_strings and (others := set(schema) - {"const", "enum", "type"} - _NO_ASSERTIONS):
        raise GrammarError(f"`{min(others)}` beside the values can't be enforced in this model's format of calls.")
    if values:
        yield {"type": "string" if has_strings else "", "enum": values}


def _is_type(name: str, allowed: Any) -> bool:
    """True for a type that is among those allowed; "" stands for listed values without strings."""
    names = [allowed] if isinstance(allowed, str) else allowed
    return name in ("", *names) or (name == "integer" and "number" in names)
