"""The grammar that holds an output to tool calls, from a request's fields."""

from __future__ import annotations

import bisect
import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jax_mla_cp.engine import GrammarError
from jax_mla_cp.serve.errors import ApiError
from jax_mla_cp.serve.schemas.chat import ChatRequest, NamedTool
from jax_mla_cp.serve.served_model import ServedModel
from jax_mla_cp.serve.structured_output import CompiledGrammar, JsonSchema, LarkGrammar
from jax_mla_cp.serve.structured_output.locate import locate
from jax_mla_cp.serve.structured_output.schema_tree import at
from jax_mla_cp.serve.tool_calls import SchemaError, ToolFormat, schemas_to_hold
from jax_mla_cp.serve.tool_calls.functions import Tools

_Compile = Callable[[Tools, Sequence[str]], CompiledGrammar]
"""Compiles the grammar of calls of some functions."""


def compile_calls(
    served: ServedModel, body: ChatRequest, calls: ToolFormat, answer: Mapping[str, Any] | None = None
) -> CompiledGrammar:
    """The grammar of `tool_choice` and of functions with `strict`.

    Args:
      answer: schema of the JSON that an output without calls is.

    Raises:
      ApiError: 400: a function's schema is malformed or can't be enforced; names the place in it.
    """
    tools, choice = body.plain_tools, body.tool_choice
    named = choice.function.name if isinstance(choice, NamedTool) else None
    names = [tool["function"]["name"] for tool in tools] if named is None else [named]
    required = choice not in (None, "auto")
    parallel = body.parallel_tool_calls is not False and named is None
    token_id = served.require_tokenizer("messages").token_id

    def compiled(tools: Tools, names: Sequence[str]) -> CompiledGrammar:
        text = calls.grammar(tools, names=names, required=required, parallel=parallel, answer=answer, token_id=token_id)
        return served.grammars.compile(LarkGrammar(text))

    try:
        return compiled(tools, names)
    except SchemaError as error:
        raise _named(tools, error.function, error) from error
    except GrammarError as error:
        name = _first_to_fail(compiled, tools, names)
        schema = schemas_to_hold(tools, names, required=required)[name]
        its_error = _error(lambda: served.grammars.compile(JsonSchema(schema))) or _alone(compiled, tools, name, schema)
        if its_error is None:  # all together are too much
            raise ApiError(400, f"tools: {error}", param="tools") from error
        raise _named(tools, name, its_error) from error


def _first_to_fail(compiled: _Compile, tools: Tools, names: Sequence[str]) -> str:
    """The function with which the grammar of `names`, which fails, begins to. The error does not tell."""

    def fails_up_to(last: int) -> bool:
        return _error(lambda: compiled(tools, names[: last + 1])) is not None

    return names[bisect.bisect_left(range(len(names) - 1), True, key=fails_up_to)]


def _alone(compiled: _Compile, tools: Tools, name: str, schema: dict[str, Any]) -> GrammarError | None:
    """The error of one function's grammar, with the place in its schema."""
    function = next(tool["function"] for tool in tools if tool["function"]["name"] == name)
    changed = copy.deepcopy(schema)

    def error() -> GrammarError | None:
        return _error(lambda: compiled([{"type": "function", "function": {**function, "parameters": changed}}], [name]))

    found = error()
    return found and at(locate(changed, lambda: str(error()) == str(found)), str(found))


def _error(work: Callable[[], object]) -> GrammarError | None:
    try:
        work()
    except GrammarError as error:
        return error
    return None


def _named(tools: Tools, function: str, error: GrammarError) -> ApiError:
    index = next(i for i, tool in enumerate(tools) if tool["function"]["name"] == function)
    path = f"tools[{index}].function.parameters"
    return ApiError(400, f"{path}: {error}", param=path)
