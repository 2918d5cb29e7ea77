"""Arguments that the model writes as JSON, up to an end marker outside of its strings."""

from __future__ import annotations

import re
from collections.abc import Sequence

from jax_mla_cp.serve.tool_calls.parser import Read
from jax_mla_cp.serve.tool_calls.pattern import WHITE_SPACE, Match, Pattern, first_match

_STRING = re.compile(r'(?:[^"\\]++|\\.)*+', re.DOTALL)


class JsonArguments:
    """Hands JSON text on verbatim, without the white space around it. Implements `parser.Arguments`.

    Strings are followed, because they may contain the markers' text. No arguments at all become `{}`: vLLM does so for Kimi.

    Args:
      ends: what ends the call.
      stops: `beginnings(ends, '"')`.
    """

    def __init__(self, ends: Sequence[Pattern], stops: re.Pattern[str]):
        self._ends = ends
        self._stops = stops
        self._begun = False
        self._in_string = False
        self._escaped = False
        self._depth = 0
        self._space: list[str] = []
        """White space that is part of the arguments if more of them follows."""

    @property
    def is_complete(self) -> bool:
        return self._begun and self._depth == 0 and not self._in_string

    def read(self, text: str, at: int) -> Read:
        parts: list[str] = []
        while at < len(text):
            if self._in_string:
                at = self._read_string(text, at, parts)
                continue
            stop = self._stops.search(text, at)
            end = len(text) if stop is None else stop.start()
            self._add(text[at:end], parts)
            at = end
            if stop is None:
                break
            self._in_string = text[at] == '"'
            found = None if self._in_string else first_match(self._ends, text, at)
            if isinstance(found, Match):
                return Read("".join(parts) if self._begun else "{}", found.end, ended=True)
            if found is not None:
                break
            self._add(text[at], parts)
            at += 1
        return Read("".join(parts), at, ended=False)

    def _add(self, text: str, parts: list[str]) -> None:
        body = text.rstrip(WHITE_SPACE)
        if not body:
            self._space.append(text)
            return
        if self._begun:
            parts += self._space
            parts.append(body)
        else:
            parts.append(body.lstrip(WHITE_SPACE))
        self._begun, self._space = True, [text[len(body) :]]
        self._depth += body.count("{") + body.count("[") - body.count("}") - body.count("]")

    def _read_string(self, text: str, at: int, parts: list[str]) -> int:
        found = _STRING.match(text, at + self._escaped)
        assert found is not None  # it matches the empty text
        # What stops it is a quote, or a backslash whose character has not come yet.
        end = min(found.end() + 1, len(text))
        stop = text[found.end() : end]
        self._in_string, self._escaped = stop != '"', stop == "\\"
        parts.append(text[at:end])
        return end
