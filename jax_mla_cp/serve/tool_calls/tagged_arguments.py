"""Arguments that the model writes as tagged keys and values (GLM), assembled into JSON text."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from jax_mla_cp.serve.tool_calls.parser import Read
from jax_mla_cp.serve.tool_calls.schema_types import argument_types
from jax_mla_cp.serve.tool_calls.tagged_value import TaggedValue

CALL_END = "</tool_call>"
KEY, KEY_END = "<arg_key>", "</arg_key>"
VALUE, VALUE_END = "<arg_value>", "</arg_value>"


class _Until:
    """Finds the first of some markers."""

    def __init__(self, *markers: str):
        self._markers = markers
        self._any = re.compile("|".join(map(re.escape, markers)))

    def __call__(self, text: str, at: int) -> tuple[str, str | None, int]:
        """The text before the marker, the marker, and where the text goes on. None: no marker yet; what may be the beginning of
        one is left."""
        if found := self._any.search(text, at):
            return text[at : found.start()], found[0], found.end()
        start = text.rfind("<", at)
        is_open = start >= 0 and any(marker.startswith(text[start:]) for marker in self._markers)
        end = start if is_open else len(text)
        return text[at:end], None, end


# By the marker before: what may follow. Text between an argument and the next is dropped, as in vLLM and SGLang.
_AFTER = {
    None: _Until(KEY, CALL_END),
    KEY: _Until(KEY_END, CALL_END),
    KEY_END: _Until(VALUE, KEY, CALL_END),
    VALUE: _Until(VALUE_END),
    VALUE_END: _Until(KEY, CALL_END),
}


class TaggedArguments:
    """Implements `parser.Arguments`.

    Args:
      parameters: the JSON schema of the function's arguments; empty: not known.
    """

    def __init__(self, parameters: Mapping[str, Any]):
        self._parameters = parameters
        self._marker: str | None = None
        self._key: list[str] = []
        self._value: TaggedValue | None = None
        self._begun = False

    @property
    def is_complete(self) -> bool:
        return False

    def read(self, text: str, at: int) -> Read:
        parts: list[str] = []
        while at < len(text):
            inside, marker, at = _AFTER[self._marker](text, at)
            if self._marker == KEY:
                self._key.append(inside)
            elif self._value is not None:
                parts.append(self._value.push(inside))
            if marker is None:
                break
            self._marker = marker
            if marker == CALL_END:
                parts.append("}" if self._begun else "{}")
                return Read("".join(parts), at, ended=True)
            if marker == KEY:
                self._key = []
            elif marker == VALUE:
                parts.append(self._begin_value())
            elif marker == VALUE_END and self._value is not None:
                parts.append(self._value.end())
                self._value = None
        return Read("".join(parts), at, ended=False)

    def _begin_value(self) -> str:
        key = "".join(self._key).strip()
        self._value = TaggedValue(argument_types(self._parameters, key))
        separator, self._begun = ", " if self._begun else "{", True
        return f"{separator}{json.dumps(key, ensure_ascii=False)}: "
