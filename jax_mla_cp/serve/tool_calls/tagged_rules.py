"""Grammar rules of GLM's tagged arguments."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from jax_mla_cp.engine import GrammarError
from jax_mla_cp.serve.structured_output.lark import quoted
from jax_mla_cp.serve.tool_calls.lark import Grammar, json_value
from jax_mla_cp.serve.tool_calls.schema_types import referred, schema_types
from jax_mla_cp.serve.tool_calls.tagged_arguments import KEY, KEY_END, VALUE, VALUE_END

_DEFINITIONS = ("$defs", "definitions")
_REFERENCE = frozenset({"$ref", "default", "description", "title"})
_MAX_REFERENCES = 8
_IN_LARK = {
    "/": r"\/",
    "\n": r"\n",
    r"\d": "[0-9]",
    r"\D": "[^0-9]",
    r"\w": "[0-9A-Za-z_]",
    r"\W": "[^0-9A-Za-z_]",
}


def add_pairs(grammar: Grammar, prefix: str, parameters: Mapping[str, Any]) -> str:
    """Adds rules for a function's arguments, in the schema's order, and returns what stands for them.

    Strings are raw text, held to `enum`, `const`, `pattern`, `minLength` and `maxLength`; one with a pattern has no "<". A
    schema without `properties` allows any pairs.

    Raises:
      GrammarError: a length is not a whole number, or no string satisfies two of them.
    """
    properties = parameters.get("properties")
    if not isinstance(properties, Mapping):
        if parameters.get("additionalProperties") is False:
            return ""
        key = grammar.up_to(f"{prefix}_key", KEY_END, body="/[^<>]{1,64}/")
        value = grammar.up_to(f"{prefix}_text", VALUE_END)
        pair = grammar.rule(f"{prefix}_pair", f"{grammar.marker(KEY)} {key} GAP {grammar.marker(VALUE)} {value}")
        return f"(GAP {pair})*"
    listed = parameters.get("required")
    required = [key for key in listed if isinstance(key, str)] if isinstance(listed, list) else []
    pairs = []
    for i, key in enumerate(dict.fromkeys([*properties, *required])):
        value = _value(grammar, f"{prefix}_v{i}", properties.get(key, True), parameters)
        name = f"{grammar.marker(KEY)} {quoted(key)} {grammar.marker(KEY_END)}"
        pair = grammar.rule(f"{prefix}_p{i}", f"GAP {name} GAP {grammar.marker(VALUE)} {value}")
        pairs.append(pair if key in required else f"{pair}?")
    return " ".join(pairs)


def _value(grammar: Grammar, name: str, schema: Any, root: Mapping[str, Any]) -> str:
    """Adds rules for a value up to and with its end marker, and returns what stands for them."""
    types = schema_types(schema, root)
    schema = _followed(schema, root)
    allowed = _allowed_values(schema)
    if allowed is not None:
        texts = [value if isinstance(value, str) else json.dumps(value) for value in allowed]
        return f"({' | '.join(map(quoted, texts))}) {grammar.marker(VALUE_END)}"
    if types is not None and "string" not in types:
        definitions = {word: root[word] for word in _DEFINITIONS if word in root}
        return f"{json_value({**definitions, **schema})} {grammar.marker(VALUE_END)}"
    body = _string(schema) if types == frozenset({"string"}) else "ANY"
    return grammar.up_to(name, VALUE_END, body)


def _followed(schema: Any, root: Mapping[str, Any]) -> Any:
    """Follows a schema that does nothing but refer to another."""
    for _ in range(_MAX_REFERENCES):
        if not isinstance(schema, Mapping) or "$ref" not in schema or not set(schema) <= _REFERENCE:
            break
        schema = referred(schema["$ref"], root)
    return schema


def _allowed_values(schema: Any) -> list[Any] | None:
    if not isinstance(schema, Mapping):
        return None
    if "const" in schema:
        return [schema["const"]]
    return schema["enum"] if isinstance(schema.get("enum"), list) and schema["enum"] else None


def _string(schema: Mapping[str, Any]) -> str:
    """A terminal for the raw text of a string.

    While the schema is not satisfied, the text has no "<", lest it ends too early.
    """
    least, most = _length(schema, "minLength") or 0, _length(schema, "maxLength")
    if most is not None and least > most:
        raise GrammarError(f"minLength: {least} is more than maxLength, {most}: no string satisfies both.")
    limit = "" if most is None else most
    if not isinstance(pattern := schema.get("pattern"), str):
        if least == 0 and most is None:
            return "ANY"
        rest = "" if most is None else most - least
        return f"/[^<]{{{least}}}(?s:.){{0,{rest}}}/"
    before = "" if pattern.startswith("^") else "(?s:.*)"
    is_anchored = re.search(r"(?<!\\)(?:\\\\)*\$$", pattern)
    bare = pattern.removeprefix("^")
    bare, after = (bare[:-1], "") if is_anchored else (bare, "(?s:.*)")
    return f"/{before}(?:{_translated(bare)}){after}/ & /[^<]{{{least},{limit}}}/"


def _length(schema: Mapping[str, Any], word: str) -> int | None:
    if word not in schema:
        return None
    value = schema[word]
    is_whole = isinstance(value, int) or (isinstance(value, float) and value.is_integer())
    if not is_whole or isinstance(value, bool) or value < 0:
        raise GrammarError(f"{word}: expected a whole number from 0 on, got {str(value)[:40]!r}.")
    return int(value)


def _translated(pattern: str) -> str:
    """A pattern of JSON Schema, whose classes are ASCII, as Lark has it: in slashes, on one line."""
    return re.sub(r"\\.|/|\n", lambda found: _IN_LARK.get(found[0], found[0]), pattern)
