"""The grammar that holds an output to tool calls, from a request's fields."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from jax_mla_cp.engine import GrammarError
from jax_mla_cp.serve.errors import ApiError
from jax_mla_cp.serve.schemas.chat import ChatRequest, NamedTool
from jax_mla_cp.serve.served_model import ServedModel
from jax_mla_cp.serve.structured_output import CompiledGrammar, JsonSchema, LarkGrammar
from jax_mla_cp.serve.tool_calls import SchemaError, ToolFormat, schemas_to_hold


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
    try:
        text = calls.grammar(
            tools,
            names=names,
            required=required,
            parallel=body.parallel_tool_calls is not False and named is None,
            answer=answer,
            token_id=served.require_tokenizer("messages").token_id,
        )
        return served.grammars.compile(LarkGrammar(text))
    except SchemaError as error:
        raise _named(tools, error.function, error) from error
    except GrammarError as error:
        # The whole grammar does not tell whose schema is to blame.
        for name, schema in schemas_to_hold(tools, names, required=required).items():
            try:
                served.grammars.compile(JsonSchema(schema))
            except GrammarError as its_error:
                raise _named(tools, name, its_error) from error
        raise ApiError(400, f"tools: {error}", param="tools") from error


def _named(tools: Sequence[dict[str, Any]], function: str, error: GrammarError) -> ApiError:
    index = next(i for i, tool in enumerate(tools) if tool["function"]["name"] == function)
    path = f"tools[{index}].function.parameters"
    return ApiError(400, f"{path}: {error}", param=path)
