"""The JSON types that a function's schema allows for an argument."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

from jax_mla_cp.serve.structured_output.schema_tree import resolve

MAX_PARTS = 256
"""Subschemas and enumerated values that are looked at for one argument; more of them count as any type."""

_ALTERNATIVES = ("anyOf", "oneOf", "allOf")
_MAX_REFERENCES = 8
UNHELD = ("$ref", "allOf", "anyOf", "oneOf", "enum", "const", "patternProperties", "minProperties", "maxProperties")
"""Keywords of a schema about all arguments together."""
_OF_ARGUMENTS = frozenset({*UNHELD, "properties", "required", "additionalProperties"})


def argument_types(parameters: Mapping[str, Any], key: str) -> frozenset[str] | None:
    """Types that the schema `parameters` allows for its property `key`. None: any.

    `allOf` counts as its union: a superset, which is all that reading a value needs.
    """
    found, _ = followed(parameters)
    properties = found.get("properties") if isinstance(found, Mapping) else None
    if not isinstance(properties, Mapping) or key not in properties:
        return None
    return schema_types(properties[key], parameters)


def followed(parameters: Mapping[str, Any]) -> tuple[Any, str]:
    """Follows a schema that does nothing but refer to one of its definitions, as some generators write it.

    Returns:
      What it stands for, and its JSON pointer.
    """
    found: Any = parameters
    pointer = ""
    for _ in range(_MAX_REFERENCES):
        if not isinstance(found, Mapping) or found.keys() & _OF_ARGUMENTS != {"$ref"}:
            break
        pointer = str(found["$ref"])[1:]
        found = referred(found["$ref"], parameters)
    return found, pointer


def schema_types(schema: Any, root: Mapping[str, Any]) -> frozenset[str] | None:
    """Types that a schema within the schema `root` allows. None: any."""
    waiting = [schema]
    seen: set[int] = set()
    types: set[str] = set()
    while waiting:  # a schema is looked at once, however many refer to it
        part = waiting.pop()
        if not isinstance(part, Mapping):
            return None
        if id(part) in seen:
            continue
        seen.add(id(part))
        if len(seen) > MAX_PARTS:
            return None
        known = _own_types(part)
        if known is not None:
            types |= known
        elif "$ref" in part:
            waiting.append(referred(part["$ref"], root))
        elif alternatives := [part[word] for word in _ALTERNATIVES if isinstance(part.get(word), list) and part[word]]:
            if len(seen) + len(waiting) + sum(map(len, alternatives)) > MAX_PARTS:
                return None
            waiting += itertools.chain(*alternatives)
        else:
            return None
    return frozenset(types | {"integer"} if "number" in types else types)


def referred(reference: Any, root: Any) -> Any:
    """The schema at a local reference such as `#/$defs/City`; None if there is none."""
    try:
        return resolve(root, reference) if isinstance(reference, str) else None
    except LookupError:
        return None


def json_type(value: Any) -> str:
    """The JSON type of a value as Python's json module reads it."""
    if isinstance(value, bool):
        return "boolean"
    names = {int: "integer", float: "number", str: "string", list: "array", dict: "object"}
    return names.get(type(value), "null")


def _own_types(schema: Mapping[str, Any]) -> set[str] | None:
    if "type" in schema:
        named = schema["type"]
        return {name for name in ([named] if isinstance(named, str) else _list(named)) if isinstance(name, str)}
    values = [schema["const"]] if "const" in schema else _list(schema.get("enum"))
    return {json_type(value) for value in values} if 0 < len(values) <= MAX_PARTS else None


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []
