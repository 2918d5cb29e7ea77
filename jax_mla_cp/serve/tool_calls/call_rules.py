"""`CallRules`: the rules to which a grammar holds an output's calls."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from jax_mla_cp.serve.structured_output.pattern_budget import PatternBudget
from jax_mla_cp.serve.structured_output.schema_check import prepare
from jax_mla_cp.serve.tool_calls.functions import Tools, naming

_NO_ARGUMENTS: Mapping[str, Any] = {"properties": {}, "additionalProperties": False}


@dataclasses.dataclass(frozen=True)
class CallRules:
    tools: Tools
    """The functions that may be called; at least one."""
    required: bool
    """The output is calls, with nothing but white space before them. False: free text, with calls at its end or without."""
    parallel: bool
    """Several calls may follow one another."""
    answer: Mapping[str, Any] | None = None
    """Schema of the JSON that the output is if it is no calls; in place of free text."""

    def schemas(self) -> dict[str, dict[str, Any]]:
        """The schema of each function's arguments, prepared. If calls are not required, only functions with `strict` follow their
        own; the arguments of others are any object.

        Raises:
          SchemaError: as `prepare`.
        """
        held: dict[str, dict[str, Any]] = {}
        budget = PatternBudget()
        for function in (tool["function"] for tool in self.tools):
            is_held = self.required or function.get("strict")
            schema = function.get("parameters") or _NO_ARGUMENTS
            with naming(function["name"]):
                held[function["name"]] = prepare({"type": "object", **(schema if is_held else {})}, budget)
        return held
