"""Grammar rules of GLM's tagged arguments."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from jax_mla_cp.engine import GrammarError
from jax_mla_cp.serve.structured_output.lark import quoted
from jax_mla_cp.serve.structured_output.schema_tree import at, escaped, extracted, refuse_id
from jax_mla_cp.serve.tool_calls.branches import TYPES, Branch, branches
from jax_mla_cp.serve.tool_calls.lark import Grammar, json_value
from jax_mla_cp.serve.tool_calls.raw_string import raw_string
from jax_mla_cp.serve.tool_calls.schema_types import UNHELD, argument_types, followed
from jax_mla_cp.serve.tool_calls.tagged_arguments import CALL_END, KEY, KEY_END, VALUE, VALUE_END
from jax_mla_cp.serve.tool_calls.tagged_value import TaggedValue

Types = frozenset[str] | None
"""The types as which the parser may read a value; None: any. It reads what is no JSON of another of them as a string."""

_MIXED = (
    "a string beside other values can't be enforced in this model's format of calls if they or the string have limits. State one "
    "`type`, or allow any value of each."
)


def add_pairs(grammar: Grammar, prefix: str, parameters: Mapping[str, Any]) -> str:
    """Adds rules for a function's arguments, in the schema's order, and returns what stands for them.

    Strings are raw text, all other values JSON. A schema without `properties` allows any pairs.

    Args:
      parameters: the function's schema, prepared.

    Raises:
      GrammarError: the schema says something that can't be enforced on tagged arguments.
    """
    root, (schema, pointer) = parameters, followed(parameters)
    if schema is True:
        schema = {}
    if not isinstance(schema, Mapping):
        raise at(pointer, "no value satisfies it.")
    if schema is not root:
        refuse_id(schema)
    if said := [word for word in UNHELD if word in schema]:
        raise GrammarError(
            f"`{said[0]}` of all arguments can't be enforced in this model's format of calls, which tags each of them. State "
            "`properties` and `required`."
        )
    properties, required = schema.get("properties", {}), schema.get("required", [])
    if not isinstance(required, list) or not all(isinstance(key, str) for key in required):
        raise GrammarError("required: expected a list of names. Correct it.")
    others = schema.get("additionalProperties", True)
    if not properties and not required:
        return _any_pairs(grammar, prefix, others)
    pairs, needed = [], frozenset(required)
    for i, key in enumerate(dict.fromkeys([*properties, *required])):
        try:
            _check_key(key)
            types = argument_types(root, key)
            value = _value(grammar, f"{prefix}_v{i}", properties.get(key, others), root, types)
        except GrammarError as error:
            raise at(f"{pointer}/properties/{escaped(key)}", str(error)) from error
        name = f"{grammar.marker(KEY)} {quoted(key)} {grammar.marker(KEY_END)}"
        pair = grammar.rule(f"{prefix}_p{i}", f"GAP {name} GAP {grammar.marker(VALUE)} {value}")
        pairs.append(pair if key in needed else f"{pair}?")
    return " ".join(pairs)


def _check_key(key: str) -> None:
    if key != key.strip() or KEY_END in key or CALL_END in key:
        raise GrammarError("its name can't be written in this model's format of calls. Rename it.")


def _any_pairs(grammar: Grammar, prefix: str, values: Any) -> str:
    if values is False:
        return ""
    if values is not True and values != {}:
        raise GrammarError("`additionalProperties` with a schema can't be enforced in this model's format of calls.")
    key = grammar.up_to(f"{prefix}_key", KEY_END, body="/[^<>]{1,64}/")
    value = grammar.up_to(f"{prefix}_text", VALUE_END)
    pair = grammar.rule(f"{prefix}_pair", f"{grammar.marker(KEY)} {key} GAP {grammar.marker(VALUE)} {value}")
    return f"(GAP {pair})*"


def _value(grammar: Grammar, name: str, schema: Any, root: Mapping[str, Any], types: Types) -> str:
    """Adds rules for a value up to and with its end marker, and returns what stands for them."""
    found = branches(schema, root)
    if not found:
        raise GrammarError("no value satisfies it.")
    if not any(branch.has_strings for branch in found):
        return f"{json_value(extracted(schema, root))} {grammar.marker(VALUE_END)}"
    if not all(branch.is_exact for branch in found):
        raise GrammarError(_MIXED)
    listed = [value for branch in found for value in branch.values or ()]
    texts = list(dict.fromkeys(map(_text, listed)))
    if any(VALUE_END in text for text in texts):
        raise GrammarError(f"a value with {VALUE_END} in it can't be written in this model's format of calls.")
    strings = [branch for branch in found if branch.type == "string"]
    if not strings and all(branch.values is not None for branch in found):
        _check_readable(listed, types)
        return f"({' | '.join(map(quoted, texts))}) {grammar.marker(VALUE_END)}"
    bodies = [raw_string(branch.limits) for branch in strings]
    _check_other_values(found, types, any_string=None in bodies)
    if None in bodies:
        return grammar.up_to(name, VALUE_END)
    return grammar.up_to(name, VALUE_END, " | ".join([*(f"({body})" for body in bodies), *map(quoted, texts)]))


def _text(value: Any) -> str:
    """A listed value as GLM writes it."""
    return value if isinstance(value, str) else json.dumps(value)


def _check_readable(listed: Sequence[Any], types: Types) -> None:
    """Raises `GrammarError` if the parser would read one of the values as another."""
    for value in listed:
        text, parser = _text(value), TaggedValue(types)
        expected = json.dumps(value, ensure_ascii=False) if isinstance(value, str) else text
        if parser.push(text) + parser.end() != expected:
            raise GrammarError(
                f"the listed value {ascii(text)[:40]} can't be told from one of another type in this model's format of calls. State "
                "the type, or list values of one type."
            )


def _check_other_values(found: Sequence[Branch], types: Types, *, any_string: bool) -> None:
    """Raises `GrammarError` if values beside strings can't be enforced.

    The parser reads the text of a string as JSON of another type where it may, so all JSON of such a type has to be allowed. And
    to text of limited strings only listed values can be added.
    """
    unlisted = [branch for branch in found if branch.values is None]
    listed = [value for branch in found for value in branch.values or ()]
    whole = {branch.type for branch in unlisted if not branch.limits}
    whole |= {"integer"} if "number" in whole else set()
    whole |= {"null"} if None in listed else set()
    whole |= {"boolean"} if {True, False} <= {value for value in listed if isinstance(value, bool)} else set()
    may_be = (TYPES if types is None else types) - {"string"}
    has_others = any(branch.type != "string" for branch in unlisted)
    if not may_be <= whole or (has_others and not any_string):
        raise GrammarError(_MIXED)
