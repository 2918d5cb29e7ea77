"""The structure of JSON schemas: subschemas, pointers and references."""

from __future__ import annotations

import copy
import urllib.parse
from collections.abc import Iterator, Mapping
from typing import Any

from jax_mla_cp.engine import GrammarError

_DEFINITIONS = ("$defs", "definitions")
_MAPS = ("properties", "patternProperties", *_DEFINITIONS)
_LISTS = ("allOf", "anyOf", "oneOf", "prefixItems")
_SINGLE = ("items", "additionalItems", "additionalProperties")

Slot = tuple[dict[str, Any] | list[Any], Any, str]
"""The place of a subschema: its container, its key there, and its pointer relative to the schema."""


def subschemas(schema: dict[str, Any], *, definitions: bool) -> Iterator[Slot]:
    """The direct subschemas, in the schema's order.

    Args:
      definitions: also those that only assert something where a `$ref` points at them.

    Raises:
      GrammarError: a keyword of subschemas has a value of another type.
    """
    for word, value in schema.items():
        if word in _DEFINITIONS and not definitions:
            continue
        if word in _MAPS:
            if not isinstance(value, dict):
                raise GrammarError(f"{word}: expected an object of schemas. Correct it.")
            yield from ((value, key, f"/{word}/{escaped(key)}") for key in value)
        elif word in _LISTS or (word == "items" and isinstance(value, list)):
            if not isinstance(value, list):
                raise GrammarError(f"{word}: expected a list of schemas. Correct it.")
            yield from ((value, i, f"/{word}/{i}") for i in range(len(value)))
        elif word in _SINGLE:
            yield schema, word, f"/{word}"


def escaped(key: str) -> str:
    """A key as part of a JSON pointer, shortened."""
    key = key if len(key) <= 40 else f"{key[:40]}.."
    return key.replace("~", "~0").replace("/", "~1")


def at(pointer: str, message: str) -> GrammarError:
    """An error about the part of a schema that a JSON pointer names."""
    return GrammarError(f"at {ascii(pointer)[1:-1][:300]}: {message}" if pointer else message)


def resolve(root: Any, reference: str) -> Any:
    """Returns the value at a reference into the same document (RFC 6901).

    Raises:
      LookupError: nothing is there, or the reference is of another kind.
    """
    if reference != "#" and not reference.startswith("#/"):
        raise LookupError(reference)
    found = root
    for part in urllib.parse.unquote(reference[1:]).split("/")[1:]:
        key = part.replace("~1", "/").replace("~0", "~")
        if isinstance(found, list) and key.isascii() and key.isdigit() and len(key) < 7:
            found = found[int(key)]
        elif isinstance(found, dict):
            found = found[key]
        else:
            raise LookupError(reference)
    return found


def extracted(schema: Mapping[str, Any], root: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of a subschema of `root` as a schema of its own. What its references reach comes along, under `$defs`.

    Raises:
      GrammarError: a reference is no pointer into `root`, or a part has an `$id`, which changes what they point into.
    """
    document = copy.deepcopy(dict(schema))
    names: dict[int, str] = {}
    definitions: dict[str, Any] = {}
    stack: list[Any] = [document]
    while stack:
        part = stack.pop()
        if not isinstance(part, dict):
            continue
        for word in _DEFINITIONS:  # what is needed of them is found by reference
            part.pop(word, None)
        if "$ref" in part:
            target = pointed(part, root)
            if id(target) not in names:
                name = names[id(target)] = f"d{len(names)}"
                definitions[name] = copy.deepcopy(target)
                stack.append(definitions[name])
            part["$ref"] = f"#/$defs/{names[id(target)]}"
        refuse_id(part)
        stack += [container[key] for container, key, _ in subschemas(part, definitions=False)]
    draft = {"$schema": root["$schema"]} if "$schema" in root else {}
    return {**draft, **document, **({"$defs": definitions} if definitions else {})}


def pointed(schema: Mapping[str, Any], root: Mapping[str, Any]) -> Any:
    """The target of a schema's `$ref`. Raises `GrammarError` if it is no pointer into `root`."""
    try:
        return resolve(root, schema["$ref"])
    except LookupError as error:
        raise GrammarError(
            "$ref: only pointers into `parameters`, such as #/$defs/Name, can be followed in this model's format of calls."
        ) from error


def refuse_id(schema: Mapping[str, Any]) -> None:
    """Raises `GrammarError` if a subschema has an `$id` (in old drafts `id`), which changes what references in it point into."""
    if isinstance(schema.get("$id", schema.get("id")), str):
        raise GrammarError("`$id` inside of a schema can't be enforced in this model's format of calls. Leave it out.")
