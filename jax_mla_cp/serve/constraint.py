"""The constraint of a request's output, from its fields to a grammar."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from jax_mla_cp.engine import GrammarError
from jax_mla_cp.serve.errors import ApiError
from jax_mla_cp.serve.schemas.generation import GenerationRequest
from jax_mla_cp.serve.served_model import ServedModel
from jax_mla_cp.serve.structured_output import (
    ANY_OBJECT,
    Choice,
    CompiledGrammar,
    Constraint,
    ContextFreeGrammar,
    JsonSchema,
    Regex,
)
from jax_mla_cp.serve.structured_output.pattern_budget import PatternBudget
from jax_mla_cp.serve.structured_output.schema_check import prepare

_CONSTRAINTS: dict[str, Callable[[Any], Constraint]] = {
    "json": JsonSchema,
    "regex": Regex,
    "choice": Choice,
    "grammar": ContextFreeGrammar,
}
"""By the name that `structured_outputs` has for it, and `guided_` before it."""


def compile_grammar(served: ServedModel, body: GenerationRequest) -> CompiledGrammar | None:
    """The grammar of the output's format; None: free text. Raises 400 for a constraint that can't be compiled."""
    for field, value in body.constraints().items():
        try:
            return served.grammars.compile(_constraint(field, value))
        except GrammarError as error:
            raise ApiError(400, f"{field}: {error}", param=field) from error
    return None


def has_json_format(body: GenerationRequest) -> bool:
    """True if the output's format is JSON."""
    return any(isinstance(_constraint(*each), JsonSchema) for each in body.constraints().items())


def answer_schema(body: GenerationRequest) -> dict[str, Any] | None:
    """The JSON schema of the output's format, prepared; None if it is not JSON. Raises `GrammarError` as `prepare`."""
    for constraint in (_constraint(*each) for each in body.constraints().items()):
        return prepare(constraint.schema, PatternBudget()) if isinstance(constraint, JsonSchema) else None
    return None


def _constraint(field: str, value: Any) -> Constraint:
    if field.startswith("response_format"):
        return JsonSchema(value.json_schema.schema_) if value.type == "json_schema" else ANY_OBJECT
    kind = field.removeprefix("structured_outputs.").removeprefix("guided_")
    return ANY_OBJECT if kind == "json_object" else _CONSTRAINTS[kind](value)
