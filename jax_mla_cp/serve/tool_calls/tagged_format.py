"""`TaggedFormat`: calls whose arguments are tagged keys and values (GLM-4.5 to 4.7)."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping

from jax_mla_cp.serve.structured_output.lark import TokenId, quoted
from jax_mla_cp.serve.tool_calls.call_rules import CallRules
from jax_mla_cp.serve.tool_calls.functions import Tools, naming, parameters_by_name
from jax_mla_cp.serve.tool_calls.lark import Grammar
from jax_mla_cp.serve.tool_calls.parser import Boundaries, ToolCallParser
from jax_mla_cp.serve.tool_calls.pattern import NAME, Pattern, Word
from jax_mla_cp.serve.tool_calls.tagged_arguments import CALL_END, KEY, TaggedArguments
from jax_mla_cp.serve.tool_calls.tagged_rules import add_pairs
from jax_mla_cp.serve.tool_calls.tool_format import ToolFormat

CALL = "<tool_call>"
_NAME = Word(re.compile(NAME))
_BOUNDARIES = Boundaries(call=[Pattern(CALL, _NAME, after, ahead=True) for after in (KEY, CALL_END)])


@dataclasses.dataclass(frozen=True, kw_only=True)
class TaggedFormat(ToolFormat):
    def new_parser(self, tools: Tools) -> ToolCallParser:
        known = parameters_by_name(tools)
        unknown: Mapping[str, object] = {}
        return ToolCallParser(_BOUNDARIES, lambda name: TaggedArguments(known.get(name, unknown)), self.call_id)

    def grammar(self, rules: CallRules, token_id: TokenId) -> str:
        grammar = Grammar(token_id)
        bodies = []
        for i, (name, schema) in enumerate(rules.schemas().items()):
            with naming(name):
                pairs = add_pairs(grammar, f"f{i}", schema)
            bodies.append(grammar.rule(f"f{i}", f"{quoted(name)} {pairs} GAP {grammar.marker(CALL_END)}"))
        grammar.rule("body", *bodies)
        rest = grammar.rule("rest", f"body (GAP {grammar.marker(CALL)} body)*" if rules.parallel else "body")
        grammar.start(CALL, rest, rules)
        return grammar.text()
