"""A schema as a union of branches: schemas of one type each, or listed values."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from jax_mla_cp.engine import GrammarError
from jax_mla_cp.serve.structured_output.messages import TYPE
from jax_mla_cp.serve.structured_output.schema_tree import pointed, refuse_id
from jax_mla_cp.serve.tool_calls.raw_string import WORDS
from jax_mla_cp.serve.tool_calls.schema_types import MAX_PARTS, json_type

TYPES = frozenset({"null", "boolean", "number", "string", "array", "object"})
_MAX_VALUES = 16_384
"""Listed values of one argument."""
_BOUNDS = frozenset({"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"})
_LIMITS: Mapping[str, frozenset[str]] = {
    "null": frozenset(),
    "boolean": frozenset(),
    "integer": _BOUNDS,
    "number": _BOUNDS,
    "string": WORDS,
    "array": frozenset({"items", "prefixItems", "additionalItems", "minItems", "maxItems"}),
    "object": frozenset(
        {"properties", "patternProperties", "additionalProperties", "required", "minProperties", "maxProperties"}
    ),
}
"""Keywords by the type that they limit."""
_FINITE: Mapping[str, Sequence[Any]] = {"null": [None], "boolean": [True, False]}
_COMBINING = ("$ref", "anyOf", "oneOf", "allOf")
_LISTING = ("const", "enum")


@dataclasses.dataclass(frozen=True)
class Branch:
    """Attributes:
    type: of its values; "" if they are listed.
    values: the listed values; None: any of the type, within the limits. Null, true and false are always listed.
    limits: keywords that limit the type.
    is_exact: False: the schema may allow fewer of these values. There is no string among them.
    """

    type: str = ""
    values: Sequence[Any] | None = None
    limits: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    is_exact: bool = True

    @property
    def has_strings(self) -> bool:
        return self.type == "string" or any(isinstance(value, str) for value in self.values or ())


def branches(schema: Any, root: Mapping[str, Any]) -> list[Branch]:
    """The union that a schema within the schema `root`, which is prepared, stands for; empty if no value satisfies it.

    Raises:
      GrammarError: it has too many parts, or says something about strings that can't be enforced on raw text.
    """
    return list(_Reader(root).read(schema))


class _Reader:
    def __init__(self, root: Mapping[str, Any]):
        self._root = root
        self._parts = 0
        self._values = 0

    def read(self, schema: Any) -> Iterator[Branch]:
        self._parts += 1
        if self._parts > MAX_PARTS:
            raise GrammarError(f"more than {MAX_PARTS} subschemas for one argument. Simplify it.")
        if schema is False:
            return
        schema = schema if isinstance(schema, Mapping) else {}
        refuse_id(schema)
        names = _names(schema)
        combining = [word for word in _COMBINING if word in schema]
        listing = [word for word in _LISTING if word in schema]
        if combining:
            yield from self._combined(combining[0], schema, names)
        elif listing:
            yield from self._listed(listing[0], schema, names)
        else:
            for name in names:
                yield Branch(values=_FINITE[name]) if name in _FINITE else Branch(name, limits=_limits(schema, name))

    def _combined(self, word: str, schema: Mapping[str, Any], names: frozenset[str]) -> Iterator[Branch]:
        parts = [pointed(schema, self._root)] if word == "$ref" else schema[word]
        found = [[narrow for branch in self.read(part) for narrow in _narrowed(branch, names)] for part in parts]
        if word == "allOf" and not all(_has_strings(part) for part in found):
            found = [[branch for branch in part if not branch.has_strings] for part in found]
        if any(_has_strings(part) for part in found):
            _refuse(word, _beside(word, schema))
            if word in ("oneOf", "allOf") and len(parts) > 1:
                raise GrammarError(f"`{word}` of strings can't be enforced in this model's format of calls. Use anyOf.")
        is_exact = not _beside(word, schema) and (len(parts) == 1 or word == "anyOf")
        for branch in itertools.chain(*found):
            yield dataclasses.replace(branch, is_exact=is_exact and branch.is_exact)

    def _listed(self, word: str, schema: Mapping[str, Any], names: frozenset[str]) -> Iterator[Branch]:
        values = [schema["const"]] if word == "const" else schema["enum"]
        if not isinstance(values, list):
            raise GrammarError("enum: expected a list. Correct it.")
        self._values += len(values)
        if self._values > _MAX_VALUES:
            raise GrammarError(f"more than {_MAX_VALUES} listed values for one argument. List fewer.")
        for branch in _narrowed(Branch(values=values), names):
            if branch.has_strings:
                _refuse(word, _beside(word, schema))
            yield dataclasses.replace(branch, is_exact=not _beside(word, schema))


def _names(schema: Mapping[str, Any]) -> frozenset[str]:
    """The types that a schema names; all without."""
    named = schema.get("type", list(TYPES))
    names = [named] if isinstance(named, str) else named
    if not isinstance(names, list) or not names or not all(isinstance(name, str) and name in _LIMITS for name in names):
        raise GrammarError(TYPE)
    return frozenset(names)


def _limits(schema: Mapping[str, Any], name: str) -> dict[str, Any]:
    return {word: schema[word] for word in _LIMITS[name] if word in schema and _asserts(word, schema[word])}


def _asserts(word: str, value: Any) -> bool:
    """False for what generators write and allows everything."""
    if word in ("items", "additionalItems", "additionalProperties"):
        return value is not True and value != {}
    if word in ("properties", "patternProperties"):
        return value != {}
    return word != "required" or value != []


def _has_strings(found: Sequence[Branch]) -> bool:
    return any(branch.has_strings for branch in found)


def _narrowed(branch: Branch, names: frozenset[str]) -> Iterator[Branch]:
    """The branch without values of types that are not among `names`."""
    if branch.values is not None:
        values = [value for value in branch.values if _is_among(json_type(value), names, value)]
        if values:
            yield dataclasses.replace(branch, values=values)
    elif _is_among(branch.type, names):
        yield branch
    elif branch.type == "number" and "integer" in names:
        yield dataclasses.replace(branch, type="integer")


def _is_among(name: str, names: frozenset[str], value: Any = None) -> bool:
    if name == "number" and isinstance(value, float) and value.is_integer():
        name = "integer"
    return name in names or (name == "integer" and "number" in names)


def _beside(word: str, schema: Mapping[str, Any]) -> set[str]:
    """Keywords of the schema beside `word` and types."""
    limits = {each for name in _LIMITS for each in _limits(schema, name)}
    return limits | ({each for each in (*_COMBINING, *_LISTING) if each in schema} - {word})


def _refuse(word: str, beside: set[str]) -> None:
    if beside:
        raise GrammarError(f"`{word}` beside `{min(beside)}` can't be enforced in this model's format of calls.")
