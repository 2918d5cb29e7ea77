"""Answers in a given form: JSON schemas as the tokens that may come next, by llguidance (github.com/guidance-ai/llguidance)."""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from llguidance import LLMatcher, LLParserLimits, LLTokenizer, TokenizerWrapper
from numpy.typing import NDArray

from jax_mla_cp.engine import GrammarError
from jax_mla_cp.tokenizer import Tokenizer

MAX_SCHEMA = 64 << 10
"""Characters of a schema as JSON."""
MAX_DEPTH = 64
"""Objects and lists in each other."""

# llguidance's own defaults are for callers that trust their schemas. With these the worst schemas that were tried take a
# tenth of a second, and a token of an answer a few milliseconds.
_LIMITS = LLParserLimits(
    initial_lexer_fuel=1_000_000, max_grammar_size=100_000, max_lexer_states=50_000, verbose_errors=False
)
# A model that is in doubt writes spaces, for ever if it may.
_OPTIONS: Any = {"whitespace_flexible": True, "whitespace_pattern": r"[\x20\x0A\x0D\x09]{1,32}"}


class JsonGrammar:
    """One answer's way through a schema. Implements `jax_mla_cp.engine.Grammar`."""

    def __init__(self, matcher: LLMatcher, vocab_size: int):
        self._matcher = matcher
        self._words = -(-vocab_size // 32)

    def copy(self) -> JsonGrammar:
        """Another answer's, from the same place."""
        return JsonGrammar(self._matcher.deep_copy(), 32 * self._words)

    def mask(self) -> NDArray[np.uint32]:
        """The tokens that may come next, as `jax_mla_cp.engine.logits_processor.LogitBias.mask`.

        Raises:
          GrammarError: the next tokens are too hard to find out.
        """
        words = np.frombuffer(self._matcher.compute_bitmask(), np.uint32)[: self._words]
        self._check()
        return np.concatenate([words, np.zeros(self._words - len(words), np.uint32)])

    def accept(self, token: int) -> None:
        """
        Raises:
          GrammarError: the token may not come here.
        """
        self._matcher.consume_token(token)
        self._check()

    @property
    def finished(self) -> bool:
        """The answer is complete, and nothing but an end token may follow."""
        return self._matcher.is_stopped()

    def _check(self) -> None:
        if self._matcher.is_error():
            raise GrammarError(f"the answer can't be held to its format: {self._matcher.get_error()}")


class Grammars:
    """Makes grammars for one model's tokens. `compile` may be called from any thread."""

    def __init__(self, tokenizer: Tokenizer | None, vocab_size: int, end_tokens: Sequence[int]):
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._end_tokens = list(end_tokens)
        self._vocabulary: LLTokenizer | None = None
        self._lock = threading.Lock()

    def compile(self, schema: Mapping[str, Any]) -> JsonGrammar:
        """A grammar for the JSON texts of a schema; `{"type": "object"}` is any object.

        Raises:
          GrammarError: no JSON schema, one that llguidance doesn't support, or one that is too large; or a model whose
            answers can't be held to one.
        """
        text = json.dumps(schema)
        if len(text) > MAX_SCHEMA or _depth(schema, MAX_DEPTH + 1) > MAX_DEPTH:
            raise GrammarError(
                f"the schema has {len(text)} characters; at most {MAX_SCHEMA}, and {MAX_DEPTH} objects and lists in each "
                "other, are allowed."
            )
        if self._tokenizer is None or not self._end_tokens:
            raise GrammarError("this model has no tokenizer or no end token, so its answers can't follow a format.")
        try:
            grammar = LLMatcher.grammar_from_json_schema(text, overrides=_OPTIONS)
        except ValueError as error:
            raise GrammarError(str(error)) from error
        matcher = LLMatcher(self._known_tokens(self._tokenizer), grammar, log_level=0, limits=_LIMITS)
        # References in a circle are found out by the first step.
        if matcher.is_error() or not any(matcher.compute_bitmask()) or matcher.is_stopped():
            raise GrammarError(" ".join(matcher.get_error().split())[:500] or "nothing can follow this schema.")
        return JsonGrammar(matcher, self._vocab_size)

    def _known_tokens(self, tokenizer: Tokenizer) -> LLTokenizer:
        with self._lock:
            if self._vocabulary is None:
                tokens = TokenizerWrapper(_Tokens(tokenizer, self._vocab_size, self._end_tokens))
                self._vocabulary = LLTokenizer(tokens, eos_token=self._end_tokens)
            return self._vocabulary


class _Tokens:
    """A model's vocabulary as llguidance asks for it: the bytes of each token, and which are special."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, end_tokens: Sequence[int]):
        self._tokenizer = tokenizer
        known = [tokenizer.token_bytes(token) for token in range(vocab_size)]
        self.special_token_ids = sorted({*end_tokens, *(i for i, token in enumerate(known) if token is None)})
        special = set(self.special_token_ids)
        self.tokens = [b"<%d>" % i if i in special else token or b"" for i, token in enumerate(known)]
        self.eos_token_id = end_tokens[0]
        self.bos_token_id = None

    def __call__(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False)


def _depth(value: Any, most: int) -> int:
    """How many objects and lists are in each other; no deeper than `most`."""
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else None
    if inner is None or most == 0:
        return 0
    return 1 + max((_depth(part, most - 1) for part in inner), default=0)
