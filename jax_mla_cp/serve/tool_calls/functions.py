"""The functions of a request's `tools`."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

Tools = Sequence[Mapping[str, Any]]
"""A request's `tools`: `{"type": "function", "function": {"name": .., "parameters": .., "strict": ..}}`."""

_NO_ARGUMENTS: Mapping[str, Any] = {"properties": {}, "additionalProperties": False}


def parameters_by_name(tools: Tools) -> dict[str, Mapping[str, Any]]:
    """The JSON schema of each function's arguments; empty for a function without one."""
    return {tool["function"]["name"]: tool["function"].get("parameters") or {} for tool in tools}


def schemas_to_hold(tools: Tools, names: Collection[str], *, required: bool) -> dict[str, Mapping[str, Any]]:
    """The schema that a grammar holds for each function in `names`.

    Args:
      required: every schema is held. False: only those of functions with `strict`, and of others that they are objects.
    """
    held: dict[str, Mapping[str, Any]] = {}
    for tool in tools:
        function = tool["function"]
        if function["name"] in names:
            is_held = required or function.get("strict")
            schema = function.get("parameters") or _NO_ARGUMENTS
            held[function["name"]] = {"type": "object", **schema} if is_held else {"type": "object"}
    return held
