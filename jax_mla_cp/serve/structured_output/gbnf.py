"""GBNF, the EBNF of llama.cpp and xgrammar: converted to Lark by llguidance's converter."""

from __future__ import annotations

import collections
import re

from llguidance.gbnf_to_lark import gbnf_to_lark

from jax_mla_cp.engine import GrammarError

_RULE = re.compile(r"^[ \t]*([A-Za-z_][\w-]*)[ \t]*::=", re.MULTILINE)
# The converter takes time that grows with the product of both.
_MAX_TEXT = 16 << 10
_MAX_RULES = 256
_UNDEFINED = re.compile(r"Rule '([\w-]{1,100})' not found")
_LINE = re.compile(r" at line (\d+)")


def is_gbnf(text: str) -> bool:
    """True if rules are written with ::=, which Lark does not have."""
    return _RULE.search(text) is not None


def convert(text: str) -> str:
    """Returns Lark text.

    Raises:
      GrammarError: the grammar is too large, or not valid.
    """
    if len(text) > _MAX_TEXT:
        raise GrammarError(f"the grammar is {len(text)} characters long; the limit with ::= is {_MAX_TEXT}. Use Lark.")
    rules = collections.Counter(_RULE.findall(text))
    if len(rules) > _MAX_RULES:
        raise GrammarError(f"the grammar has {len(rules)} rules; the limit with ::= is {_MAX_RULES}. Use Lark.")
    if repeated := [name for name, count in rules.items() if count > 1]:
        raise GrammarError(f"the rule {repeated[0][:100]} is defined twice. Join both with |.")
    if "root" not in rules:
        raise GrammarError("there is no rule `root`. Add it.")
    try:
        return gbnf_to_lark(text)
    except RecursionError as error:
        raise GrammarError("the grammar is nested too deeply. Split it into rules.") from error
    except Exception as error:  # the converter raises plain Exception, and IndexError where the text ends
        raise GrammarError(_message(str(error))) from error


def _message(error: str) -> str:
    if (name := _UNDEFINED.search(error)) is not None:
        return f"the rule {name[1]} is not defined. Add it."
    if "already exists" in error:
        return "two rules have names that differ only in case, - and _, or one is called start. Rename one."
    line = _LINE.search(error)
    return f"the grammar's syntax is wrong{f' in line {line[1]}' if line else ''}. Correct it."
