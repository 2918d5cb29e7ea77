"""The kinds of constraints, as vLLM's `structured_outputs` has them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any


@dataclasses.dataclass(frozen=True)
class JsonSchema:
    """JSON that conforms to a schema, an object or its JSON text."""

    schema: Mapping[str, Any] | str


@dataclasses.dataclass(frozen=True)
class Regex:
    """Text that matches a regular expression as a whole, in the syntax of Rust's regex crate."""

    pattern: str


MAX_CHOICES = 4096


@dataclasses.dataclass(frozen=True)
class Choice:
    """One of several texts, at most `MAX_CHOICES`, literally."""

    choices: Sequence[str]


@dataclasses.dataclass(frozen=True)
class ContextFreeGrammar:
    """Text of a grammar: Lark in llguidance's dialect (its docs/syntax.md) with the rule `start`, or GBNF (llama.cpp's
    grammars/README.md, the EBNF of xgrammar and vLLM) with the rule `root`."""

    text: str


@dataclasses.dataclass(frozen=True)
class LarkGrammar:
    """Text of a Lark grammar that the server writes itself, around JSON schemas of a request."""

    text: str


Constraint = JsonSchema | Regex | Choice | ContextFreeGrammar | LarkGrammar

ANY_OBJECT = JsonSchema({"type": "object"})
"""Any JSON object: `response_format: {"type": "json_object"}`."""
