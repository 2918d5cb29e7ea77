"""Lark text for llguidance (its docs/syntax.md): pieces that the grammars of all formats are made of."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from jax_mla_cp.engine import GrammarError
from jax_mla_cp.serve.structured_output.grammars import MAX_OWN_TEXT
from jax_mla_cp.serve.structured_output.lark import TokenId, quoted
from jax_mla_cp.serve.tool_calls.call_rules import CallRules

_COMMON = r"""GAP: /[ \t\r\n]{0,4}/
ANY: /(?s:.*)/"""
"""Terminals. GAP: white space beside a marker."""


def json_value(schema: Mapping[str, Any]) -> str:
    return f"%json {json.dumps(schema)}"


class Grammar:
    """Collects rules."""

    def __init__(self, token_id: TokenId):
        self._token_id = token_id
        self._rules: list[str] = []
        self._length = 0

    def rule(self, name: str, *alternatives: str) -> str:
        """Adds a rule, or a terminal if the name is in capitals, and returns the name.

        Raises:
          GrammarError: the grammar is too long.
        """
        self._rules.append(f"{name}: {' | '.join(alternatives)}")
        self._length += len(self._rules[-1])
        if self._length > MAX_OWN_TEXT:
            raise GrammarError(
                f"the grammar of all tools is more than {MAX_OWN_TEXT} characters long. Send fewer tools, or shorter schemas."
            )
        return name

    def marker(self, text: str) -> str:
        """The marker as its token, or as text if it is none."""
        token = self._token_id(text)
        return quoted(text) if token is None else f"<[{token}]>"

    def up_to(self, name: str, end: str, body: str = "ANY") -> str:
        """Adds rules for text of the form `body` up to and with the first `end`, and returns what stands for them.

        As for the parser, the end counts however it is spelled: as its token, or letter by letter.
        """
        text = self.rule(name.upper(), body)
        self.rule(f"{name}[lazy]", f"{text} {quoted(end)}")
        return name if self._token_id(end) is None else f"({text} {self.marker(end)} | {name})"

    def start(self, first: str, rest: str, rules: CallRules) -> None:
        """Adds the rule `start`: calls that begin with the marker `first`, and `rest` behind it."""
        if rules.required or rules.answer is not None:
            answers = [] if rules.answer is None else [json_value(rules.answer)]
            self.rule("start", f"GAP {self.marker(first)} {rest}", *answers)
        else:
            self.rule("start", "ANY", f"{self.up_to('head', first)} {rest}")

    def text(self) -> str:
        return "\n".join(["%llguidance {}", *self._rules, _COMMON])
