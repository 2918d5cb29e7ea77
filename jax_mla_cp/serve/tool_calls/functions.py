"""The functions of a request's `tools`."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from jax_mla_cp.engine import GrammarError

Tools = Sequence[Mapping[str, Any]]
"""A request's `tools`: `{"type": "function", "function": {"name": .., "parameters": .., "strict": ..}}`."""


class SchemaError(GrammarError):
    """The schema of a function's arguments is malformed or can't be enforced."""

    def __init__(self, function: str, message: str):
        super().__init__(message)
        self.function = function


def parameters_by_name(tools: Tools) -> dict[str, Mapping[str, Any]]:
    """The JSON schema of each function's arguments; empty for a function without one."""
    return {tool["function"]["name"]: tool["function"].get("parameters") or {} for tool in tools}


@contextlib.contextmanager
def naming(function: str) -> Iterator[None]:
    """Raises a `GrammarError` as the `SchemaError` of a function."""
    try:
        yield
    except GrammarError as error:
        raise SchemaError(function, str(error)) from error
