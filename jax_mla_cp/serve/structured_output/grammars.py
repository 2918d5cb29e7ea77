"""`Grammars`: compiles constraints for one model's vocabulary."""

from __future__ import annotations

import copy
import json
import threading
from collections.abc import Sequence
from typing import Any

from llguidance import LLMatcher, LLParserLimits, LLTokenizer

from jax_mla_cp.engine import GrammarError
from jax_mla_cp.serve.structured_output import gbnf
from jax_mla_cp.serve.structured_output.big_stack import with_big_stack
from jax_mla_cp.serve.structured_output.compiled_grammar import CompiledGrammar
from jax_mla_cp.serve.structured_output.constraints import (
    MAX_CHOICES,
    Choice,
    Constraint,
    ContextFreeGrammar,
    JsonSchema,
    LarkGrammar,
    Regex,
)
from jax_mla_cp.serve.structured_output.lark import LarkText, quoted
from jax_mla_cp.serve.structured_output.locate import locate
from jax_mla_cp.serve.structured_output.messages import grammar_message, schema_message
from jax_mla_cp.serve.structured_output.pattern_budget import PatternBudget
from jax_mla_cp.serve.structured_output.schema_check import prepare
from jax_mla_cp.serve.structured_output.schema_tree import at
from jax_mla_cp.serve.structured_output.vocabulary import llguidance_vocabulary
from jax_mla_cp.tokenizer import Tokenizer

MAX_TEXT = 64 << 10
"""Characters of a grammar, or of all choices together."""
MAX_OWN_TEXT = 1 << 20
"""Characters of a grammar that the server writes around a request's schemas."""

# llguidance's defaults are for trusted grammars. With these limits the worst ones that were tried compile in about a second,
# and a mask takes a few milliseconds.
_LIMITS = LLParserLimits(
    initial_lexer_fuel=300_000, max_grammar_size=100_000, max_lexer_states=50_000, verbose_errors=False
)


class Grammars:
    """Compiles constraints. Thread-safe."""

    def __init__(self, tokenizer: Tokenizer | None, vocab_size: int, eos_token_ids: Sequence[int]):
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._eos_token_ids = list(eos_token_ids)
        self._vocabulary: LLTokenizer | None = None
        self._lock = threading.Lock()

    def compile(self, constraint: Constraint) -> CompiledGrammar:
        """Compiles a constraint.

        Raises:
          GrammarError: the constraint is malformed, too large, or can't be satisfied or enforced; or the model has no tokenizer
            or no EOS token. The message is for the client and names the part of the constraint.
        """
        tokenizer = self._tokenizer
        if tokenizer is None or not self._eos_token_ids:
            raise GrammarError("this model has no tokenizer or no EOS token, so structured output is not available.")
        if isinstance(constraint, JsonSchema):
            schema = prepare(constraint.schema, PatternBudget())
            return self._match(tokenizer, _of_schema(schema), [schema])
        if isinstance(constraint, Regex):
            PatternBudget().spend(len(constraint.pattern))
            _check_unicode(constraint.pattern)
            return self._match(tokenizer, LLMatcher.grammar_from_regex(constraint.pattern))
        if isinstance(constraint, Choice):
            return self._match(tokenizer, LLMatcher.grammar_from_lark(_of_choices(constraint.choices)))
        lark = _lark_text(constraint, tokenizer)
        places = isinstance(constraint, ContextFreeGrammar) and not gbnf.is_gbnf(constraint.text)
        return self._match(tokenizer, LLMatcher.grammar_from_lark(lark.text), lark.schemas, places=places)

    def _match(
        self, tokenizer: Tokenizer, grammar: str, schemas: Sequence[dict[str, Any]] = (), *, places: bool = False
    ) -> CompiledGrammar:
        vocabulary = self._llguidance_vocabulary(tokenizer)

        def build() -> LLMatcher:
            matcher = LLMatcher(vocabulary, grammar, log_level=0, limits=_LIMITS)
            # Circular references only show up in the first mask.
            if matcher.is_error() or not any(matcher.compute_bitmask()) or matcher.is_stopped():
                for schema in schemas:
                    _check_schema(schema)
                raise GrammarError(grammar_message(matcher.get_error() or "NoExtension", places=places))
            return matcher

        return CompiledGrammar(with_big_stack(build), self._vocab_size)

    def _llguidance_vocabulary(self, tokenizer: Tokenizer) -> LLTokenizer:
        with self._lock:
            if self._vocabulary is None:
                self._vocabulary = llguidance_vocabulary(tokenizer, self._vocab_size, self._eos_token_ids)
            return self._vocabulary


def _of_schema(schema: dict[str, Any]) -> str:
    return LLMatcher.grammar_from_json_schema(json.dumps(schema))


def _check_schema(schema: dict[str, Any]) -> None:
    """Raises `GrammarError` with the place in the schema if llguidance refuses it."""

    def message(tried: dict[str, Any]) -> str | None:
        error = LLMatcher.validate_grammar(_of_schema(tried), limits=_LIMITS)
        return schema_message(error) if error else None

    found = message(schema)
    if found is not None:
        changed = copy.deepcopy(schema)
        raise at(locate(changed, lambda: message(changed) == found), found)


def _of_choices(choices: Sequence[str]) -> str:
    if not 1 <= len(choices) <= MAX_CHOICES:
        raise GrammarError(f"expected 1 to {MAX_CHOICES} choices, got {len(choices)}. Send as many.")
    if (length := sum(map(len, choices))) > MAX_TEXT:
        raise GrammarError(f"the choices have {length} characters together; the limit is {MAX_TEXT}. Shorten them.")
    if "" in choices:
        raise GrammarError("a choice must not be empty. Leave it out.")
    for choice in choices:
        _check_unicode(choice)
    return f"start: CHOICE\nCHOICE: {' | '.join(map(quoted, dict.fromkeys(choices)))}"


def _lark_text(constraint: ContextFreeGrammar | LarkGrammar, tokenizer: Tokenizer) -> LarkText:
    text = constraint.text
    limit = MAX_OWN_TEXT if isinstance(constraint, LarkGrammar) else MAX_TEXT
    if len(text) > limit:
        raise GrammarError(f"the grammar is {len(text)} characters long; the limit is {limit}. Shorten it.")
    _check_unicode(text)
    if isinstance(constraint, ContextFreeGrammar) and gbnf.is_gbnf(text):
        text = gbnf.convert(text)
    return LarkText(text, tokenizer.token_id)


def _check_unicode(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise GrammarError("text that is not valid Unicode: a lone surrogate. Correct it.") from error
