"""`ChatFormat`: how one chat request's output is constrained and read, by the model's reasoning and tool-call formats."""

from __future__ import annotations

from collections.abc import Sequence

from jax_mla_cp.engine import Grammar
from jax_mla_cp.serve.constraint import compile_grammar, has_json_format
from jax_mla_cp.serve.errors import ApiError
from jax_mla_cp.serve.output_parser import OutputParser
from jax_mla_cp.serve.reasoning import (
    END_TAG,
    START_TAG,
    ReasoningGrammar,
    ReasoningParser,
    ReasoningStart,
    prompt_starts_reasoning,
)
from jax_mla_cp.serve.schemas.chat import ChatRequest, NamedTool
from jax_mla_cp.serve.served_model import ServedModel
from jax_mla_cp.serve.structured_output import CompiledGrammar
from jax_mla_cp.serve.tool_grammar import compile_calls


class ChatFormat:
    """Raises `ApiError` for a request that the model's formats can't serve."""

    def __init__(self, served: ServedModel, body: ChatRequest, prompt: Sequence[int]):
        tokenizer = served.require_tokenizer("messages")
        self._served = served
        self._body = body
        self._tools = body.plain_tools
        self._calls = served.tool_format if self._tools else None
        if self._tools and self._calls is None:
            message = (
                "tools: this model's chat template has none of the known formats of tool calls. Start the server with "
                "--tool-parser, or send tool_choice none."
            )
            raise ApiError(400, message, param="tools")
        self._in_reasoning = served.is_reasoning and prompt_starts_reasoning(tokenizer, prompt)
        self._end_token = tokenizer.token_id(END_TAG)
        self._start_token = tokenizer.token_id(START_TAG)
        is_constrained = bool(body.constraints())
        self._can_call = self._calls is not None and (not is_constrained or has_json_format(body))
        if self._calls is not None and self._can_call and (body.holds_calls or is_constrained):
            self._grammar: CompiledGrammar | None = compile_calls(served, body, self._calls)
        else:
            self._grammar = compile_grammar(served, body)
        self._check_reasoning()
        # A grammar that applies from the first token on leaves no place for reasoning; that of `strict` applies from a call on.
        is_free = self._grammar is None or (not is_constrained and body.tool_choice in (None, "auto"))
        self._parses_reasoning = served.is_reasoning and (is_free or self._in_reasoning)

    def _check_reasoning(self) -> None:
        """Raises 400 for a budget where nothing reasons, or if a constraint or a budget needs the end of the reasoning, and the tags
        are not single tokens."""
        if self._body.thinking_token_budget is not None and not self._served.is_reasoning:
            message = (
                "thinking_token_budget: not available. This model does not reason, or the server was started with "
                "--reasoning-parser none. Leave it out."
            )
            raise ApiError(400, message, param="thinking_token_budget")
        has_tags = self._end_token is not None and (self._in_reasoning or self._start_token is not None)
        if self._grammar is not None and self._in_reasoning and not has_tags:
            field = self._body.grammar_field()
        elif self._body.thinking_token_budget is not None and not has_tags:
            field = "thinking_token_budget"
        else:
            return
        message = (
            f"{field}: not available. This model's {START_TAG} and {END_TAG} are not single tokens, so the server can't tell "
            "where the answer starts."
        )
        raise ApiError(400, message, param=field)

    @property
    def is_forced_call(self) -> bool:
        """True if the request names the function to call."""
        return isinstance(self._body.tool_choice, NamedTool)

    @property
    def shown_tokens(self) -> frozenset[int]:
        """Special tokens of the vocabulary that the parsers have to see."""
        markers = self._calls.markers if self._calls is not None else ()
        tags = (START_TAG, END_TAG) if self._parses_reasoning else ()
        return self._tokens([*markers, *tags])

    def new_parser(self) -> OutputParser:
        """A parser for one choice."""
        reasoning = None
        if self._parses_reasoning:
            reasoning = ReasoningParser(in_reasoning=self._in_reasoning, also_ends=self._call_starts)
        calls = None if self._calls is None else self._calls.new_parser(self._tools)
        return OutputParser(reasoning, calls, parallel=self._body.parallel_tool_calls is not False)

    def new_grammar(self) -> Grammar | None:
        """A grammar for one choice. None: free text."""
        grammar = None if self._grammar is None else self._grammar.copy()
        budget, start = self._body.thinking_token_budget, self._reasoning_start
        reasons = self._in_reasoning or start is not None
        if self._end_token is None or not reasons or (grammar is None and budget is None):
            return grammar
        return ReasoningGrammar(
            grammar,
            end_token=self._end_token,
            vocab_size=self._served.vocab_size,
            start=start,
            budget=budget,
            eos_tokens=self._served.eos_token_ids,
            also_ends=self._tokens(self._call_starts) if self._can_call else (),
        )

    @property
    def _reasoning_start(self) -> ReasoningStart | None:
        """None if the output can't begin with <think>."""
        if self._in_reasoning or not self._parses_reasoning or self._start_token is None:
            return None
        tokenizer, shown = self._served.require_tokenizer("messages"), self.shown_tokens
        skip = self._body.skip_special_tokens is not False

        def is_blank(token: int) -> bool:
            return not tokenizer.decode([token], skip_special_tokens=skip, shown=shown).strip()

        return ReasoningStart(self._start_token, is_blank)

    @property
    def _call_starts(self) -> tuple[str, ...]:
        """Texts that begin calls."""
        return self._calls.section_start if self._calls is not None else ()

    def _tokens(self, texts: Sequence[str]) -> frozenset[int]:
        """The ids of those texts that are tokens."""
        tokenizer = self._served.require_tokenizer("messages")
        return frozenset(token for text in texts if (token := tokenizer.token_id(text)) is not None)
