"""Prepares a JSON schema for llguidance: nothing that it asserts is left out, and what can't be enforced is refused by its place."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from jax_mla_cp.engine import GrammarError
from jax_mla_cp.serve.structured_output.endless import find_endless
from jax_mla_cp.serve.structured_output.one_of import are_disjoint
from jax_mla_cp.serve.structured_output.pattern_budget import MAX_INTERSECTED, PatternBudget
from jax_mla_cp.serve.structured_output.schema_tree import at, resolve, subschemas

MAX_SCHEMA = 64 << 10
"""Characters of a schema, serialized as JSON."""
MAX_DEPTH = 64
"""Levels of nested objects and arrays."""
_MAX_STEPS = 200
"""Steps by `$ref`, `allOf`, `anyOf` and `oneOf` that follow one another without a value between them."""

# A model that is unsure tends to write white space, without end if the grammar allows it.
_OPTIONS = {"whitespace_flexible": True, "whitespace_pattern": r"[\x20\x0A\x0D\x09]{1,32}"}

ENFORCED_FORMATS = frozenset(
    {"date-time", "time", "date", "duration", "email", "hostname", "ipv4", "ipv6", "uuid", "uri"}
)
"""Other values of `format` are annotations, as JSON Schema has it."""

# Assertions of any draft, whatever `$schema` says: by the rules of another draft they would assert nothing.
_UNSUPPORTED = frozenset(
    {
        *("not", "if", "then", "else", "dependentSchemas", "dependentRequired", "dependencies", "propertyNames"),
        *("contains", "minContains", "maxContains", "uniqueItems", "unevaluatedItems", "unevaluatedProperties"),
        *("$dynamicRef", "$recursiveRef", "$dynamicAnchor", "$recursiveAnchor", "extends", "disallow", "divisibleBy"),
    }
)
_ASSERTS_NOTHING: Mapping[str, tuple[Any, ...]] = {
    "uniqueItems": (False,),
    "propertyNames": (True, {}, {"type": "string"}),
    "unevaluatedItems": (True, {}),
    "unevaluatedProperties": (True, {}),
    "dependentRequired": ({},),
    "dependentSchemas": ({},),
    "dependencies": ({},),
    "$recursiveAnchor": (False,),
}
_COUNTS = ("minLength", "maxLength", "minItems", "maxItems", "minProperties", "maxProperties")
_BOUNDS = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum")


def prepare(schema: Mapping[str, Any] | str, budget: PatternBudget) -> dict[str, Any]:
    """A copy of a schema, in which the rest is for llguidance to enforce or to refuse.

    Unknown values of `format` are removed, and so are keywords that assert nothing. `oneOf` becomes `anyOf` where at most one
    branch can match.

    Args:
      budget: for the patterns in it.

    Raises:
      GrammarError: the schema is malformed, too large, circular, or has a keyword or reference that is not supported.
    """
    root = _copy(schema)
    root["x-guidance"] = _OPTIONS  # replaces a client's, which could turn the enforcement off
    _Check(root, budget).run()
    return root


def _copy(schema: Mapping[str, Any] | str) -> dict[str, Any]:
    try:
        if not isinstance(schema, str):
            if _depth(schema, MAX_DEPTH + 1) > MAX_DEPTH:
                raise RecursionError
            schema = json.dumps(schema, allow_nan=False)
        if len(schema) > MAX_SCHEMA:
            raise GrammarError(f"the schema is {len(schema)} characters long; the limit is {MAX_SCHEMA}. Shorten it.")
        root = json.loads(schema, parse_constant=_refuse_constant)
        json.dumps(root, ensure_ascii=False, allow_nan=False).encode()  # 1e999 is infinite, and "\ud800" no Unicode
    except GrammarError:
        raise
    except json.JSONDecodeError as error:
        raise GrammarError(
            f"the schema is not valid JSON: {error.msg} at character {error.pos}. Correct it."
        ) from error
    except RecursionError as error:
        raise GrammarError(f"the schema is nested too deeply; the limit is {MAX_DEPTH} levels.") from error
    except (TypeError, ValueError) as error:
        raise GrammarError(
            "the schema has a number that is infinite or too long, or text that is not Unicode."
        ) from error
    if not isinstance(root, dict):
        raise GrammarError("the schema must be a JSON object.")
    if _depth(root, MAX_DEPTH + 1) > MAX_DEPTH:
        raise GrammarError(f"the schema is nested too deeply; the limit is {MAX_DEPTH} levels.")
    return root


def _refuse_constant(name: str) -> float:
    raise ValueError(name)


def _depth(value: Any, limit: int) -> int:
    """Levels of nested objects and arrays, counted up to `limit`."""
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else None
    if inner is None or limit == 0:
        return 0
    return 1 + max((_depth(part, limit - 1) for part in inner), default=0)


class _Check:
    """Visits each subschema once, those that only references reach included, and changes it in place."""

    def __init__(self, root: dict[str, Any], budget: PatternBudget):
        self._root = root
        self._budget = budget
        self._patterns: dict[int, int | None] = {}
        # A nested $id changes what references in it refer to: llguidance resolves those.
        self._has_ids = any(isinstance(each.get(word), str) for each in self._all() for word in ("$id", "id"))

    def _all(self) -> list[dict[str, Any]]:
        """All objects below the root."""
        found: list[dict[str, Any]] = []
        stack: list[Any] = list(self._root.values())
        while stack:
            value = stack.pop()
            if isinstance(value, dict):
                found.append(value)
                stack += value.values()
            elif isinstance(value, list):
                stack += value
        return found

    def run(self) -> None:
        visited: set[int] = set()
        found: list[tuple[str, dict[str, Any]]] = []
        stack: list[tuple[str, Any]] = [("", self._root)]
        while stack:
            pointer, schema = stack.pop()
            if isinstance(schema, bool) or id(schema) in visited:
                continue
            if not isinstance(schema, dict):
                raise at(pointer, "expected a schema: an object, true or false. Correct it.")
            visited.add(id(schema))
            found.append((pointer, schema))
            try:
                self._check_words(schema)
                inner = [
                    (pointer + rest, container[key]) for container, key, rest in subschemas(schema, definitions=False)
                ]
            except GrammarError as error:
                raise at(pointer, str(error)) from error
            target = self._target(pointer, schema)
            if target is not None:
                inner.append((schema["$ref"][1:], target))
            stack += reversed(inner)
        for pointer, schema in found:
            if self._count_patterns(pointer, schema, 0) > MAX_INTERSECTED:
                raise at(
                    pointer, f"a text would have to match more than {MAX_INTERSECTED} patterns at once. Combine them."
                )
        endless = find_endless(self._root, found)
        if endless is not None:
            raise at(endless, "no value satisfies it: it has to contain itself without end. Make a property optional.")
        for _, schema in found:
            if (
                "anyOf" not in schema
                and isinstance(schema.get("oneOf"), list)
                and are_disjoint(self._root, schema["oneOf"])
            ):
                words = list(schema.items())
                schema.clear()
                schema.update(("anyOf" if word == "oneOf" else word, value) for word, value in words)

    def _check_words(self, schema: dict[str, Any]) -> None:
        for word, nothing in _ASSERTS_NOTHING.items():
            if word in schema and any(schema[word] == value and type(schema[word]) is type(value) for value in nothing):
                del schema[word]
        if unsupported := [word for word in schema if word in _UNSUPPORTED]:
            raise GrammarError(
                f"`{unsupported[0]}` can't be enforced. Leave it out and check the answer yourself, or say it in other keywords."
            )
        if "format" in schema:
            if not isinstance(schema["format"], str):
                raise GrammarError("format: expected a string. Correct it.")
            if schema["format"] not in ENFORCED_FORMATS:
                del schema["format"]
        for word in _COUNTS:
            if isinstance(count := schema.get(word), float) and count.is_integer():
                schema[word] = int(count)
        for word in _BOUNDS:
            bound = schema.get(word)
            # llguidance holds bounds as float64, and whole numbers up to 2**63 - 1.
            if isinstance(bound, int) and abs(bound) < (1 << 63) - 1 and int(float(bound)) != bound:
                raise GrammarError(f"{word}: not held exactly beyond 2**53. Use a bound within, or none.")
        multiple = schema.get("multipleOf")
        if isinstance(multiple, int | float) and not isinstance(multiple, bool) and multiple > 0:
            self._budget.multiple_of(multiple)
        patterns = list(schema["patternProperties"]) if isinstance(schema.get("patternProperties"), dict) else []
        for pattern in [*patterns, schema.get("pattern")]:
            if isinstance(pattern, str):
                self._budget.spend(len(pattern))

    def _target(self, pointer: str, schema: dict[str, Any]) -> Any:
        """The target of `$ref`; None without one, or if only llguidance can tell."""
        reference = schema.get("$ref")
        if reference is None:
            return None
        if not isinstance(reference, str):
            raise at(pointer, "$ref: expected a string. Correct it.")
        if not reference.startswith("#") and not self._has_ids and "$id" not in self._root and "id" not in self._root:
            raise at(
                pointer, "$ref to another document is not followed. Put the definition into this schema, under $defs."
            )
        try:
            return resolve(self._root, reference)
        except LookupError as error:
            if self._has_ids or not reference.startswith("#/"):
                return None
            raise at(
                pointer, f"$ref: nothing is at {ascii(reference)[1:-1][:100]}. Correct it, or add the definition."
            ) from error

    def _count_patterns(self, pointer: str, schema: Any, followed: int) -> int:
        """Number of patterns that a value of this schema has to match at once."""
        if not isinstance(schema, dict):
            return 0
        if id(schema) in self._patterns:
            if (known := self._patterns[id(schema)]) is None:
                raise at(pointer, "$ref leads back here without a value between: it is circular. Break the circle.")
            return known
        if followed > _MAX_STEPS:
            raise at(pointer, f"more than {_MAX_STEPS} $ref, allOf and anyOf follow one another. Shorten the chain.")
        self._patterns[id(schema)] = None
        count = ("pattern" in schema) + ("format" in schema)
        for part in schema.get("allOf", ()):
            count += self._count_patterns(pointer, part, followed + 1)
        if "$ref" in schema:
            count += self._count_patterns(pointer, self._target(pointer, schema), followed + 1)
        for word in ("anyOf", "oneOf"):
            count += max(
                (self._count_patterns(pointer, part, followed + 1) for part in schema.get(word, ())), default=0
            )
        self._patterns[id(schema)] = count
        return count
