"""Terminals of a Lark grammar for strings that are written raw, without quotes, and end before "<"."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from jax_mla_cp.engine import GrammarError

_HEX, _DATE = "[0-9a-fA-F]", "[0-9]{4}-(0[1-9]|1[0-2])-(0[1-9]|[12][0-9]|3[01])"
_TIME = r"([01][0-9]|2[0-3]):[0-5][0-9]:([0-5][0-9]|60)(\.[0-9]+)?([zZ]|[+-]([01][0-9]|2[0-3]):[0-5][0-9])"
_BYTE = "(25[0-5]|2[0-4][0-9]|1[0-9][0-9]|[1-9]?[0-9])"
_LABEL = "[a-zA-Z0-9]([a-zA-Z0-9-]{0,61}[a-zA-Z0-9])?"
_FORMATS = {
    "date": _DATE,
    "time": _TIME,
    "date-time": f"{_DATE}[tT]{_TIME}",
    "uuid": f"{_HEX}{{8}}-{_HEX}{{4}}-{_HEX}{{4}}-{_HEX}{{4}}-{_HEX}{{12}}",
    "ipv4": rf"{_BYTE}(\.{_BYTE}){{3}}",
    "hostname": rf"{_LABEL}(\.{_LABEL})*",
    "email": rf"[a-zA-Z0-9!#$%&'*+\/=?^_`{{|}}~.-]{{1,64}}@{_LABEL}(\.{_LABEL})*",
}
"""RFC 3339 (dates and times), RFC 4122 (uuid), RFC 2673 (ipv4), RFC 1123 (hostname), RFC 5321 (email, without quotes)."""
_IN_LARK = {
    "/": r"\/",
    "\n": r"\n",
    "\\\n": r"\n",
    r"\d": "[0-9]",
    r"\D": "[^0-9]",
    r"\w": "[0-9A-Za-z_]",
    r"\W": "[^0-9A-Za-z_]",
}
_PIECE = re.compile(r"\\.|\[\^?\]?(?:\\.|[^\]\\])*\]|.", re.DOTALL)
"""An escape, a class or a character."""
_TO_WRITE = re.compile(r"\\.|/|\n", re.DOTALL)
_FLAGS = re.compile(r"\(\?[a-zA-Z-]+\)")
_ANY = "(?s:.*)"
WORDS = frozenset({"minLength", "maxLength", "pattern", "format"})
"""Keywords of a schema about a string."""


def raw_string(schema: Mapping[str, Any]) -> str | None:
    """The body of a terminal for the strings that a schema allows. None: any.

    While the schema is not satisfied, the text has no "<", lest it ends too early.

    Raises:
      GrammarError: a keyword has a wrong value or can't be enforced, or no string satisfies two of them.
    """
    least, most = _length(schema, "minLength") or 0, _length(schema, "maxLength")
    if most is not None and least > most:
        raise GrammarError(f"minLength: {least} is more than maxLength, {most}: no string satisfies both.")
    forms = []
    if "pattern" in schema:
        forms.append("|".join(_branches(schema["pattern"])))
    if "format" in schema:  # one that is enforced: `prepare` has removed the others
        forms.append(_format(schema["format"]))
    if forms:
        limit = "" if most is None else most
        return " & ".join([*(f"/{form}/" for form in forms), f"/[^<]{{{least},{limit}}}/"])
    if least == 0 and most is None:
        return None
    rest = "" if most is None else most - least
    return f"/[^<]{{{least}}}(?s:.){{0,{rest}}}/"


def _format(name: str) -> str:
    if name not in _FORMATS:
        raise GrammarError(
            f"format: {name} can't be enforced in this model's format of calls. Use a pattern, or one of "
            f"{', '.join(_FORMATS)}."
        )
    return f"(?:{_FORMATS[name]})"


def _length(schema: Mapping[str, Any], word: str) -> int | None:
    if word not in schema:
        return None
    value = schema[word]
    is_whole = isinstance(value, int) or (isinstance(value, float) and value.is_integer())
    if not is_whole or isinstance(value, bool) or value < 0:
        raise GrammarError(f"{word}: expected a whole number from 0 on, got {str(value)[:40]!r}.")
    return int(value)


def _branches(pattern: Any) -> Iterator[str]:
    """A pattern of JSON Schema, which is searched for, as patterns for the whole text: one per alternative, since `^` and `$`
    belong to theirs alone."""
    if not isinstance(pattern, str):
        raise GrammarError("pattern: expected a string. Correct it.")
    if _FLAGS.search("".join(piece if len(piece) == 1 else "." for piece in _PIECE.findall(pattern))):
        raise GrammarError("pattern: flags such as (?i) can't be enforced. Write the characters out: [aA].")
    for pieces in _alternatives(_PIECE.findall(pattern)):
        begins, ends = pieces[:1] == ["^"], pieces[-1:] == ["$"]
        inner = pieces[begins : len(pieces) - ends]
        if "^" in inner or "$" in inner:
            raise GrammarError(
                "pattern: ^ and $ can only be enforced at the ends of the pattern or of one of its outer alternatives."
            )
        # JSON Schema's classes are ASCII; Lark's patterns stand in slashes, on one line.
        text = _TO_WRITE.sub(lambda found: _IN_LARK.get(found[0], found[0]), "".join(inner))
        yield f"{'' if begins else _ANY}(?:{text}){'' if ends else _ANY}"


def _alternatives(pieces: list[str]) -> Iterator[list[str]]:
    """Divides a pattern at every `|` that is in no group."""
    depth, branch = 0, list[str]()
    for piece in pieces:
        depth += (piece == "(") - (piece == ")")
        if depth < 0:
            break
        if piece == "|" and depth == 0:
            yield branch
            branch = []
        else:
            branch.append(piece)
    if depth != 0:
        raise GrammarError("pattern: its parentheses don't match. Correct it.")
    yield branch
