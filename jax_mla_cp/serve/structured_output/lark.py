"""Lark text of clients and of tool-call formats: its JSON schemas are prepared, its token names resolved, its terminals bounded.

The tokens of the language are those of llguidance's parser/src/lark/lexer.rs.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

from jax_mla_cp.engine import GrammarError
from jax_mla_cp.serve.structured_output.pattern_budget import MAX_INTERSECTED, MAX_PATTERN, PatternBudget
from jax_mla_cp.serve.structured_output.schema_check import prepare

_LEXEME = re.compile(
    r"""(?P<skip>(?:\#|//)[^\n]*|[ \t]+)
    |(?P<line>(?:\r?\n)+[ \t]*)
    |(?P<string>"(?:\\(?:["\\/bfnrt]|u[a-fA-F0-9]{4}|x[a-fA-F0-9]{2})|[^"\\\x00-\x1F\x7F])*"i?)
    |(?P<regex>/(?:\\.|[^/\\])+/[imslux]*)
    |(?P<data>%(?:json|regex|llguidance)(?![a-z]))
    |(?P<token><[^<>\s]+>)
    |(?P<rule>!?[_?]?[a-z][_a-z0-9\-]*)
    |(?P<terminal>_?[A-Z][_A-Z0-9\-]*)
    |(?P<other>.)""",
    re.VERBOSE | re.DOTALL,
)
_IDS = re.compile(r"<\[[\^0-9,\-*]*\]>")
_REFUSED_OPTIONS = frozenset({"stop", "temperature"})
_DECODER = json.JSONDecoder()

TokenId = Callable[[str], int | None]
"""The id of a text that is one token of the vocabulary; None if it is none."""


def quoted(text: str) -> str:
    """A text as a literal of Lark, whose strings are JSON's but for DEL."""
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")


class LarkText:
    """A grammar that is ready for llguidance.

    Args:
      token_id: the id of a text that is one token of the vocabulary.

    Raises:
      GrammarError: a schema in it is refused, a token is not in the vocabulary, its terminals are too long, or it has an option
        that would have no effect.
    """

    def __init__(self, text: str, token_id: TokenId):
        self.schemas: list[dict[str, Any]] = []
        self._token_id = token_id
        budget = PatternBudget()
        sizes = _TerminalSizes(budget)
        written: list[str] = []
        defined = name = previous = ""
        in_brackets = 0
        position = 0
        while position < len(text):
            found = _LEXEME.match(text, position)
            assert found is not None
            kind, lexeme, position = str(found.lastgroup), found[0], found.end()
            if kind == "data":
                start = position
                value, position = _value(lexeme, text, start)
                if lexeme == "%json":
                    value = prepare(value, budget)
                    self.schemas.append(value)
                lines = "\n" * text.count("\n", start, position)  # so that llguidance counts as the client does
                lexeme = f"{lexeme} {lines}{json.dumps(value)}"
            elif kind == "token":
                lexeme = self._ids(lexeme)
            elif lexeme in ('"', "/"):
                # To search for the end of the next ones too would take quadratic time.
                line = text.count("\n", 0, found.start()) + 1
                raise GrammarError(
                    f"line {line}: a text or regular expression has no end, or a wrong escape. Correct it."
                )
            elif lexeme == "=" and previous in _REFUSED_OPTIONS:
                raise GrammarError(f"the option {previous} has no effect here. Remove it; `suffix` ends a terminal.")
            in_brackets += (lexeme == "[") - (lexeme == "]")
            if kind in ("rule", "terminal") and not in_brackets:
                name = lexeme
            if lexeme == ":":
                defined = name
            elif kind not in ("skip", "line"):
                sizes.add(defined, kind, lexeme)
                previous = lexeme
            written.append(lexeme)
        sizes.check()
        self.text = "".join(written)

    def _ids(self, lexeme: str) -> str:
        """The token in llguidance's syntax for ids: it has no names for tokens that are not special."""
        if _IDS.fullmatch(lexeme):
            return lexeme
        token = self._token_id(lexeme)
        if token is None:
            raise GrammarError(
                f"the grammar names the token {ascii(lexeme)[1:-1][:100]}, which this model does not have. Write a text in double "
                "quotes, or the id of a token as <[ID]>."
            )
        return f"<[{token}]>"


def _value(keyword: str, text: str, start: int) -> tuple[Any, int]:
    """The JSON value behind a keyword, and where it ends."""
    start = len(text) - len(text[start:].lstrip())
    try:
        return _DECODER.raw_decode(text, start)
    except (ValueError, RecursionError) as error:
        raise GrammarError(f"{keyword} must be followed by valid JSON, not nested too deeply. Correct it.") from error


class _TerminalSizes:
    """The lengths of terminals, with those that they refer to written out."""

    def __init__(self, budget: PatternBudget) -> None:
        self._budget = budget
        self._own: dict[str, list[int]] = {}
        self._references: dict[str, list[str]] = {}

    def add(self, defined: str, kind: str, lexeme: str) -> None:
        """Adds a piece of the body of the rule or terminal `defined`."""
        is_terminal = defined.lstrip("_")[:1].isupper()
        if kind == "regex" and not is_terminal:
            self._budget.spend(len(lexeme))
        if is_terminal:
            own = self._own.setdefault(defined, [0, 0])
            own[0] += len(lexeme) if kind == "regex" else 1
            own[1] += lexeme == "&"
            if kind == "terminal":
                self._references.setdefault(defined, []).append(lexeme)

    def check(self) -> None:
        """Raises `GrammarError` for terminals that are too long, or ask for too many patterns at once."""
        whole: dict[str, tuple[int, int]] = {}
        for name in self._own:
            stack = [name]
            while stack:
                pending = [
                    each for each in self._references.get(stack[-1], ()) if each in self._own and each not in whole
                ]
                # A terminal that refers to itself is llguidance's to refuse.
                if pending and len(stack) <= MAX_PATTERN and pending[0] not in stack:
                    stack.append(pending[0])
                    continue
                done = stack.pop()
                parts = [self._own[done], *(whole.get(each, (0, 0)) for each in self._references.get(done, ()))]
                size, patterns = (min(sum(part[i] for part in parts), MAX_PATTERN + 1) for i in (0, 1))
                whole[done] = (size, patterns)
        for name, (size, patterns) in whole.items():
            if patterns >= MAX_INTERSECTED:
                raise GrammarError(
                    f"the terminal {name[:40]} has more than {MAX_INTERSECTED} patterns joined by &. Use fewer."
                )
            self._budget.spend(size, of=f"the terminal {name[:40]}, with those that it refers to,")
