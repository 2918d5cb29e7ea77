"""`ToolFormat`: the way a model family writes calls."""

from __future__ import annotations

import abc
import dataclasses
import uuid

from jax_mla_cp.serve.structured_output.lark import TokenId
from jax_mla_cp.serve.tool_calls.call_rules import CallRules
from jax_mla_cp.serve.tool_calls.functions import Tools
from jax_mla_cp.serve.tool_calls.parser import ToolCallParser


@dataclasses.dataclass(frozen=True, kw_only=True)
class ToolFormat(abc.ABC):
    """Attributes:
    name: as vLLM's `--tool-call-parser` has it.
    markers: texts that the parser has to see, also where they are special tokens of the vocabulary.
    section_start: markers that begin calls. They end a reasoning whose </think> is missing.
    """

    name: str
    markers: tuple[str, ...]
    section_start: tuple[str, ...]

    @abc.abstractmethod
    def new_parser(self, tools: Tools) -> ToolCallParser:
        """A parser for one output."""

    @abc.abstractmethod
    def grammar(self, rules: CallRules, token_id: TokenId) -> str:
        """Lark text for llguidance that holds an output to the rules.

        Args:
          token_id: the id of a text that is one token of the vocabulary. A marker has to be written with its token.

        Raises:
          SchemaError: a function's schema is malformed or can't be enforced.
        """

    def call_id(self, name: str, index: int) -> str:
        """The id of a call.

        Args:
          index: the number of calls before it in the conversation; only some formats write it.
        """
        return f"call_{uuid.uuid4().hex[:24]}"
