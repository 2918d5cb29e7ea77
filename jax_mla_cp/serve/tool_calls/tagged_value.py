"""One value of GLM's tagged arguments: raw text, if it is a string, else JSON."""

from __future__ import annotations

import enum
import json
from typing import Any

from jax_mla_cp.serve.tool_calls.schema_types import json_type

_PYTHON_WORDS = {"True": "true", "False": "false", "None": "null"}
"""Models write them; vLLM's parser takes them too."""

_STRING, _STRING_OR_NULL = frozenset({"string"}), frozenset({"string", "null"})
_CONTAINERS = frozenset({"array", "object"})


class _Kind(enum.Enum):
    UNKNOWN = enum.auto()
    STRING = enum.auto()
    VERBATIM = enum.auto()
    WHOLE = enum.auto()
    """Decided by all of its text."""


class TaggedValue:
    """Turns a value's text into JSON as it comes. Strings, arrays and objects of known type are not held back.

    Args:
      types: JSON types that the schema allows; None: any. A string that an argument of unknown type may be is taken for JSON
        if it is valid JSON, as in vLLM.
    """

    def __init__(self, types: frozenset[str] | None):
        self._types = types
        self._is_container = types is not None and bool(types) and types <= _CONTAINERS
        self._kind = _Kind.UNKNOWN
        self._parts: list[str] = []

    def push(self, text: str) -> str:
        """Adds text and returns the JSON that is certain by now."""
        before = ""
        if self._kind is _Kind.UNKNOWN:
            text = "".join([*self._parts, text])
            if self._is_container:
                text = text.lstrip()
            self._kind = self._decide(text)
            self._parts = []
            before = '"' if self._kind is _Kind.STRING else ""
        if self._kind is _Kind.STRING:
            return before + _escape(text)
        if self._kind is _Kind.VERBATIM:
            return text
        self._parts.append(text)
        return ""

    def end(self) -> str:
        """The rest of the value, whose text is complete."""
        if self._kind is _Kind.STRING:
            return '"'
        return "" if self._kind is _Kind.VERBATIM else self._whole("".join(self._parts))

    def _decide(self, text: str) -> _Kind:
        types = self._types
        if types == _STRING:
            return _Kind.STRING
        if types == _STRING_OR_NULL:
            return _Kind.UNKNOWN if "null".startswith(text) else _Kind.STRING
        if self._is_container:
            return _Kind.UNKNOWN if not text else _Kind.VERBATIM if text[0] in "[{" else _Kind.WHOLE
        return _Kind.WHOLE

    def _whole(self, text: str) -> str:
        bare, types = text.strip(), self._types
        word = _PYTHON_WORDS.get(bare, bare)
        found = _type_of(word)
        if types is None:
            is_json = found is not None
        elif "string" in types:
            is_json = found in types and found != "string"
        else:
            is_json = found is not None
            text = bare
        return word if is_json else f'"{_escape(text)}"'


def _type_of(text: str) -> str | None:
    """The type of a JSON text; None: it isn't JSON."""
    try:
        return json_type(json.loads(text, parse_int=_zero, parse_constant=_refuse))
    except (ValueError, RecursionError):
        return None


def _zero(_: str) -> int:
    return 0  # Python refuses to read integers of thousands of digits


def _refuse(constant: str) -> Any:
    raise ValueError(f"{constant} isn't JSON")


def _escape(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)[1:-1]
