"""Lark text for llguidance (its docs/syntax.md): pieces that the grammars of all formats are made of."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

TokenId = Callable[[str], int | None]
"""The id of a text that is one token of the vocabulary."""

# A model that is unsure tends to write white space, without end if the grammar allows it.
_OPTIONS = {"whitespace_flexible": True, "whitespace_pattern": r"[\x20\x0A\x0D\x09]{1,32}"}

_COMMON = r"""GAP: /[ \t\r\n]{0,4}/
ANY: /(?s:.*)/"""
"""Terminals. GAP: white space beside a marker."""


def literal(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def json_value(schema: Mapping[str, Any]) -> str:
    return "%json " + json.dumps({**schema, "x-guidance": _OPTIONS})


class Grammar:
    """Collects rules."""

    def __init__(self, token_id: TokenId):
        self._token_id = token_id
        self._rules: list[str] = []

    def rule(self, name: str, *alternatives: str) -> str:
        """Adds a rule, or a terminal if the name is in capitals, and returns the name."""
        self._rules.append(f"{name}: {' | '.join(alternatives)}")
        return name

    def marker(self, text: str) -> str:
        """The marker as its token, or as text if it is none."""
        token = self._token_id(text)
        return literal(text) if token is None else f"<[{token}]>"

    def up_to(self, name: str, end: str, body: str = "ANY") -> str:
        """Adds rules for text of the form `body` up to and with the first `end`, and returns what stands for them.

        As for the parser, the end counts however it is spelled: as its token, or letter by letter.
        """
        text = self.rule(name.upper(), body)
        self.rule(f"{name}[lazy]", f"{text} {literal(end)}")
        return name if self._token_id(end) is None else f"({text} {self.marker(end)} | {name})"

    def start(self, first: str, rest: str, *, required: bool) -> None:
        """Adds the rule `start`: calls that begin with the marker `first`, and `rest` behind it.

        Args:
          required: as for `ToolFormat.grammar`.
        """
        if required:
            self.rule("start", f"GAP {self.marker(first)} {rest}")
        else:
            self.rule("start", "ANY", f"{self.up_to('head', first)} {rest}")

    def text(self) -> str:
        return "\n".join(["%llguidance {}", *self._rules, _COMMON])
