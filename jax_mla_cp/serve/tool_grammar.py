"""The grammar that holds an output to tool calls, from a request's fields."""

from __future__ import annotations

import bisect
import copy
import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from jax_mla_cp.engine import GrammarError
from jax_mla_cp.serve.constraint import answer_schema, compile_grammar
from jax_mla_cp.serve.errors import ApiError
from jax_mla_cp.serve.schemas.chat import ChatRequest, NamedTool
from jax_mla_cp.serve.served_model import ServedModel
from jax_mla_cp.serve.structured_output import CompiledGrammar, JsonSchema, LarkGrammar
from jax_mla_cp.serve.structured_output.locate import locate
from jax_mla_cp.serve.structured_output.schema_tree import at
from jax_mla_cp.serve.tool_calls import CallRules, SchemaError, ToolFormat

_Compile = Callable[[CallRules], CompiledGrammar]


def compile_calls(served: ServedModel, body: ChatRequest, calls: ToolFormat) -> CompiledGrammar:
    """The grammar of `tool_choice`, of functions with `strict`, and of an answer in JSON beside calls.

    Raises:
      ApiError: 400: the answer's or a function's schema is malformed or can't be enforced; names the place in it.
    """
    choice = body.tool_choice
    named = choice.function.name if isinstance(choice, NamedTool) else None
    token_id = served.require_tokenizer("messages").token_id

    def compiled(rules: CallRules) -> CompiledGrammar:
        return served.grammars.compile(LarkGrammar(calls.grammar(rules, token_id)))

    try:
        rules = CallRules(
            [tool for tool in body.plain_tools if named in (None, tool["function"]["name"])],
            required=choice not in (None, "auto"),
            parallel=body.parallel_tool_calls is not False and named is None,
            answer=answer_schema(body),
        )
        return compiled(rules)
    except SchemaError as error:
        raise _named(body, error.function, error) from error
    except GrammarError as error:
        compile_grammar(served, body)  # raises the error of the answer's schema under its own name
        raise _blamed(served, body, compiled, rules, error) from error


def _blamed(
    served: ServedModel, body: ChatRequest, compiled: _Compile, rules: CallRules, error: GrammarError
) -> ApiError:
    """The error under the name of the function that is to blame, which `error`, of the whole grammar, does not tell."""
    tool = rules.tools[_first_to_fail(compiled, rules)]
    name = tool["function"]["name"]
    alone = dataclasses.replace(rules, tools=[tool], answer=None)
    schema = alone.schemas()[name]
    its_error = _error(lambda: served.grammars.compile(JsonSchema(schema))) or _located(compiled, alone, schema)
    if its_error is None:  # all together are too much
        return ApiError(400, f"tools: {error}", param="tools")
    return _named(body, name, its_error)


def _first_to_fail(compiled: _Compile, rules: CallRules) -> int:
    """The number of the function with which the grammar, which fails, begins to."""

    def fails_up_to(last: int) -> bool:
        return _error(lambda: compiled(dataclasses.replace(rules, tools=rules.tools[: last + 1]))) is not None

    return bisect.bisect_left(range(len(rules.tools) - 1), True, key=fails_up_to)


def _located(compiled: _Compile, alone: CallRules, schema: Mapping[str, Any]) -> GrammarError | None:
    """The error of one function's grammar, with the place in its schema; None: it has none."""
    changed = copy.deepcopy(dict(schema))
    function = {**alone.tools[0]["function"], "parameters": changed}
    changing = dataclasses.replace(alone, tools=[{"type": "function", "function": function}])

    def error() -> GrammarError | None:
        return _error(lambda: compiled(changing))

    found = error()
    return found and at(locate(changed, lambda: str(error()) == str(found)), str(found))


def _error(work: Callable[[], object]) -> GrammarError | None:
    try:
        work()
    except GrammarError as error:
        return error
    return None


def _named(body: ChatRequest, function: str, error: GrammarError) -> ApiError:
    index = next(i for i, tool in enumerate(body.plain_tools) if tool["function"]["name"] == function)
    path = f"tools[{index}].function.parameters"
    return ApiError(400, f"{path}: {error}", param=path)
