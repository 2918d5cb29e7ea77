"""`JsonFormat`: sections of calls whose arguments are JSON (DeepSeek, Kimi)."""

from __future__ import annotations

import dataclasses
import re

from jax_mla_cp.serve.structured_output.lark import TokenId, quoted
from jax_mla_cp.serve.tool_calls.call_rules import CallRules
from jax_mla_cp.serve.tool_calls.functions import Tools
from jax_mla_cp.serve.tool_calls.json_arguments import JsonArguments
from jax_mla_cp.serve.tool_calls.lark import Grammar, json_value
from jax_mla_cp.serve.tool_calls.parser import Boundaries, ToolCallParser
from jax_mla_cp.serve.tool_calls.pattern import NAME, Pattern, Word, beginnings
from jax_mla_cp.serve.tool_calls.tool_format import ToolFormat

_NAME = re.compile(NAME)
_NUMBERED_NAME = re.compile(rf"(?:functions\.)?+{NAME}:(?P<number>[0-9]{{1,9}})")


@dataclasses.dataclass(frozen=True, kw_only=True)
class JsonFormat(ToolFormat):
    """Attributes:
    section, call: the markers that begin and end each.
    before_name, after_name, before_end: texts between the call's first marker, the name, the arguments and the last marker.
    between: text between two calls.
    is_numbered: the name is written as `functions.NAME:NUMBER`, which is also the call's id.
    """

    section: tuple[str, str]
    call: tuple[str, str]
    before_name: tuple[str, ...] = ()
    after_name: tuple[str, ...] = ()
    before_end: tuple[str, ...] = ()
    between: str = ""
    is_numbered: bool = False

    def new_parser(self, tools: Tools) -> ToolCallParser:
        name = Word(_NUMBERED_NAME if self.is_numbered else _NAME)
        head: list[str | Word] = [*_bare(self.before_name), name, *_bare(self.after_name)]
        # Models forget the fence, or to end the call before the section.
        tails: set[tuple[str, ...]] = {_bare(self.before_end), ()}
        ends = [Pattern(*tail, self.call[1]) for tail in tails]
        ends += [Pattern(*tail, self.section[1], ahead=True) for tail in tails]
        stops = beginnings(ends, '"')
        boundaries = Boundaries(
            call=[Pattern(self.section[0], self.call[0], *head), Pattern(self.call[0], *head)],
            empty=[Pattern(*self.section)],
            section_end=[Pattern(self.section[1])],
        )
        return ToolCallParser(boundaries, lambda _: JsonArguments(ends, stops), self.call_id)

    def grammar(self, rules: CallRules, token_id: TokenId) -> str:
        grammar = Grammar(token_id)
        before, after, end = (
            [self._written(text, grammar) for text in texts]
            for texts in (self.before_name, self.after_name, self.before_end)
        )
        bodies = []
        for i, (name, schema) in enumerate(rules.schemas().items()):
            written = [quoted(f"functions.{name}:"), "/0|[1-9][0-9]{0,3}/"] if self.is_numbered else [quoted(name)]
            bodies.append(grammar.rule(f"f{i}", " ".join([*before, *written, *after, json_value(schema), *end])))
        grammar.rule("body", *bodies)
        begin, finish = map(grammar.marker, self.call)
        call = grammar.rule("call", f"{begin} body {finish}")
        more = f" ({quoted(self.between) if self.between else ''} {call})*" if rules.parallel else ""
        rest = grammar.rule("rest", f"{call}{more} {grammar.marker(self.section[1])}")
        grammar.start(self.section[0], rest, rules)
        return grammar.text()

    def call_id(self, name: str, index: int) -> str:
        return f"functions.{name}:{index}" if self.is_numbered else super().call_id(name, index)

    def _written(self, text: str, grammar: Grammar) -> str:
        return grammar.marker(text) if text in self.markers else quoted(text)


def _bare(texts: tuple[str, ...]) -> tuple[str, ...]:
    """The texts as a `Pattern` has them, which allows white space everywhere."""
    return tuple(text.strip() for text in texts)
