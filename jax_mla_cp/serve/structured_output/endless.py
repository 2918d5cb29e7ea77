"""Finds schemas that contain themselves without end, which no finite value satisfies. llguidance takes them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

from jax_mla_cp.serve.structured_output.schema_tree import resolve


def find_endless(root: dict[str, Any], schemas: Sequence[tuple[str, dict[str, Any]]]) -> str | None:
    """The pointer of the first schema whose values have to contain a value of the same schema, by required properties or items.

    Args:
      schemas: with their pointers.
    """
    done: set[int] = set()
    for pointer, schema in schemas:
        open_: dict[int, Iterator[dict[str, Any]]] = {}  # in the order of the descent
        following: dict[str, Any] | None = schema
        while following is not None:
            if id(following) in open_:
                return pointer
            if id(following) not in done:
                open_[id(following)] = _mandatory(root, following)
            following = None
            while open_ and following is None:
                last = next(reversed(open_))
                following = next(open_[last], None)
                if following is None:
                    del open_[last]
                    done.add(last)
    return None


def _mandatory(root: dict[str, Any], schema: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The subschemas that each value of the schema, or a part of it, has to match."""
    parts: list[Any] = list(schema.get("allOf", ()))
    with contextlib.suppress(LookupError):
        parts.append(resolve(root, schema.get("$ref", "")))
    properties, required = schema.get("properties"), schema.get("required")
    if schema.get("type") == "object" and isinstance(properties, dict) and isinstance(required, list):
        parts += (properties[key] for key in required if isinstance(key, str) and key in properties)
    least = schema.get("minItems", 0)
    if schema.get("type") == "array" and isinstance(least, int) and least > 0 and not schema.get("prefixItems"):
        parts.append(schema.get("items"))
    return (part for part in parts if isinstance(part, dict))
