"""The functions of a request's `tools`."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from jax_mla_cp.engine import GrammarError
from jax_mla_cp.serve.structured_output.pattern_budget import PatternBudget
from jax_mla_cp.serve.structured_output.schema_check import prepare

Tools = Sequence[Mapping[str, Any]]
"""A request's `tools`: `{"type": "function", "function": {"name": .., "parameters": .., "strict": ..}}`."""


class SchemaError(GrammarError):
    """The schema of a function's arguments is malformed or can't be enforced."""

    def __init__(self, function: str, message: str):
        super().__init__(message)
        self.function = function


_NO_ARGUMENTS: Mapping[str, Any] = {"properties": {}, "additionalProperties": False}


def parameters_by_name(tools: Tools) -> dict[str, Mapping[str, Any]]:
    """The JSON schema of each function's arguments; empty for a function without one."""
    return {tool["function"]["name"]: tool["function"].get("parameters") or {} for tool in tools}


def schemas_to_hold(tools: Tools, names: Collection[str], *, required: bool) -> dict[str, dict[str, Any]]:
    """The schema that a grammar holds for each function in `names`, prepared.

    Args:
      required: every schema is held. False: only those of functions with `strict`, and of others that they are objects.

    Raises:
      SchemaError: as `prepare`.
    """
    held: dict[str, dict[str, Any]] = {}
    budget = PatternBudget()
    for tool in tools:
        function = tool["function"]
        if function["name"] in names:
            is_held = required or function.get("strict")
            schema = function.get("parameters") or _NO_ARGUMENTS
            with naming(function["name"]):
                held[function["name"]] = prepare({"type": "object", **(schema if is_held else {})}, budget)
    return held


@contextlib.contextmanager
def naming(function: str) -> Iterator[None]:
    """Raises a `GrammarError` as the `SchemaError` of a function."""
    try:
        yield
    except GrammarError as error:
        raise SchemaError(function, str(error)) from error
