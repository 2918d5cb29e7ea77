"""Structured output: constraints compiled to token masks by llguidance (github.com/guidance-ai/llguidance).

A request states one of the `Constraint` types; `Grammars.compile` makes a `CompiledGrammar` of it for one model's vocabulary.
Whatever a constraint asks for is enforced, or it is refused with a `GrammarError` that says which part, in this API's words.
"""

from __future__ import annotations

from jax_mla_cp.serve.structured_output.compiled_grammar import CompiledGrammar
from jax_mla_cp.serve.structured_output.constraints import (
    ANY_OBJECT,
    MAX_CHOICES,
    Choice,
    Constraint,
    ContextFreeGrammar,
    JsonSchema,
    LarkGrammar,
    Regex,
)
from jax_mla_cp.serve.structured_output.grammars import Grammars

__all__ = [
    "ANY_OBJECT",
    "MAX_CHOICES",
    "Choice",
    "CompiledGrammar",
    "Constraint",
    "ContextFreeGrammar",
    "Grammars",
    "JsonSchema",
    "LarkGrammar",
    "Regex",
]
