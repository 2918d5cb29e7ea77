"""Decides if the branches of `oneOf` exclude one another."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations
from typing import Any

from jax_mla_cp.serve.structured_output.schema_tree import resolve

_MAX_BRANCHES = 64
_MAX_REFERENCES = 8
_TYPES = frozenset({"null", "boolean", "number", "string", "array", "object"})


def are_disjoint(root: dict[str, Any], branches: list[Any]) -> bool:
    """True if a value can match at most one branch: by its type, or by a property with other texts in each branch, as generators
    write tagged unions (`"kind": {"const": "a"}`). References are followed, which llguidance does not do here."""
    if len(branches) > _MAX_BRANCHES:
        return False
    followed = [_follow(root, branch) for branch in branches]
    return all(_types(a).isdisjoint(_types(b)) or _differ_in_a_tag(root, a, b) for a, b in combinations(followed, 2))


def _follow(root: dict[str, Any], schema: Any) -> dict[str, Any]:
    """The schema or what its `$ref` stands for: a necessary condition. Empty if there is none to be found."""
    for _ in range(_MAX_REFERENCES):
        if not isinstance(schema, dict) or "$ref" not in schema:
            break
        try:
            schema = resolve(root, schema["$ref"])
        except LookupError:
            return {}
    return schema if isinstance(schema, dict) and "$ref" not in schema else {}


def _types(schema: dict[str, Any]) -> frozenset[str]:
    given = schema.get("type")
    names = [given] if isinstance(given, str) else given if isinstance(given, list) else _TYPES
    return frozenset("number" if name == "integer" else str(name) for name in names)


def _differ_in_a_tag(root: dict[str, Any], a: dict[str, Any], b: dict[str, Any]) -> bool:
    if not _types(a) == _types(b) == {"object"}:
        return False
    tags = dict(_tags(root, b))
    return any(key in tags and texts.isdisjoint(tags[key]) for key, texts in _tags(root, a))


def _tags(root: dict[str, Any], schema: dict[str, Any]) -> Iterator[tuple[str, frozenset[str]]]:
    """The required properties that allow only certain texts."""
    properties, required = schema.get("properties"), schema.get("required")
    if not isinstance(properties, dict) or not isinstance(required, list):
        return
    for key in required:
        if isinstance(key, str) and key in properties:
            value = _follow(root, properties[key])
            allowed = [value["const"]] if "const" in value else value.get("enum")
            if isinstance(allowed, list) and all(isinstance(text, str) for text in allowed):
                yield key, frozenset(allowed)
