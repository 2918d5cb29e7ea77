"""Structured output: JSON schemas compiled to token masks by llguidance (github.com/guidance-ai/llguidance)."""

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
"""Characters of a schema, serialized as JSON."""
MAX_DEPTH = 64
"""Levels of nested objects and arrays."""

# llguidance's defaults are for trusted schemas. With these limits the worst schemas that were tried compile in a tenth of
# a second, and a mask takes a few milliseconds.
_LIMITS = LLParserLimits(
    initial_lexer_fuel=1_000_000, max_grammar_size=100_000, max_lexer_states=50_000, verbose_errors=False
)
# A model that is unsure tends to write white space, without end if the grammar allows it.
_OPTIONS: Any = {"whitespace_flexible": True, "whitespace_pattern": r"[\x20\x0A\x0D\x09]{1,32}"}


class JsonGrammar:
    """The state of one output within a schema. Implements `jax_mla_cp.engine.Grammar`."""

    def __init__(self, matcher: LLMatcher, vocab_size: int):
        self._matcher = matcher
        self._words = -(-vocab_size // 32)

    def copy(self) -> JsonGrammar:
        """An independent copy in the same state."""
        return JsonGrammar(self._matcher.deep_copy(), 32 * self._words)

    def mask(self) -> NDArray[np.uint32]:
        """The allowed next tokens as a bit mask, in the format of `jax_mla_cp.batch.logit_bias.LogitBias.mask`.

        Raises:
          GrammarError: computing the mask exceeds llguidance's limits.
        """
        words = np.frombuffer(self._matcher.compute_bitmask(), np.uint32)[: self._words]
        self._check()
        return np.concatenate([words, np.zeros(self._words - len(words), np.uint32)])

    def accept(self, token: int) -> None:
        """Advances the state by a sampled token.

        Raises:
          GrammarError: the grammar does not allow the token here.
        """
        self._matcher.consume_token(token)
        self._check()

    @property
    def finished(self) -> bool:
        """The output is complete: only an EOS token may follow."""
        return self._matcher.is_stopped()

    def _check(self) -> None:
        if self._matcher.is_error():
            raise GrammarError(f"constrained decoding failed: {self._matcher.get_error()}")


class Grammars:
    """Compiles grammars for one model's vocabulary. Thread-safe."""

    def __init__(self, tokenizer: Tokenizer | None, vocab_size: int, eos_token_ids: Sequence[int]):
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._eos_token_ids = list(eos_token_ids)
        self._vocabulary: LLTokenizer | None = None
        self._lock = threading.Lock()

    def compile(self, schema: Mapping[str, Any]) -> JsonGrammar:
        """Compiles a JSON schema; `{"type": "object"}` allows any object.

        Raises:
          GrammarError: the schema is invalid, unsupported by llguidance, too large, or unsatisfiable; or the model has no
            tokenizer or no EOS token.
        """
        text = json.dumps(schema)
        if len(text) > MAX_SCHEMA:
            raise GrammarError(f"the schema is {len(text)} characters long; the limit is {MAX_SCHEMA}.")
        if _depth(schema, MAX_DEPTH + 1) > MAX_DEPTH:
            raise GrammarError(f"the schema is nested too deeply; the limit is {MAX_DEPTH} levels.")
        if self._tokenizer is None or not self._eos_token_ids:
            raise GrammarError("this model has no tokenizer or no EOS token, so structured output is not available.")
        try:
            grammar = LLMatcher.grammar_from_json_schema(text, overrides=_OPTIONS)
        except ValueError as error:
            raise GrammarError(str(error)) from error
        matcher = LLMatcher(self._llguidance_vocabulary(self._tokenizer), grammar, log_level=0, limits=_LIMITS)
        # Circular references only show up in the first mask.
        if matcher.is_error() or not any(matcher.compute_bitmask()) or matcher.is_stopped():
            raise GrammarError(" ".join(matcher.get_error().split())[:500] or "no output satisfies this schema.")
        return JsonGrammar(matcher, self._vocab_size)

    def _llguidance_vocabulary(self, tokenizer: Tokenizer) -> LLTokenizer:
        with self._lock:
            if self._vocabulary is None:
                tokens = TokenizerWrapper(_Tokens(tokenizer, self._vocab_size, self._eos_token_ids))
                self._vocabulary = LLTokenizer(tokens, eos_token=self._eos_token_ids)
            return self._vocabulary


class _Tokens:
    """A model's vocabulary in llguidance's interface: the bytes of each token, and which tokens are special."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, eos_token_ids: Sequence[int]):
        self._tokenizer = tokenizer
        known = [tokenizer.token_bytes(token) for token in range(vocab_size)]
        self.special_token_ids = sorted({*eos_token_ids, *(i for i, token in enumerate(known) if token is None)})
        special = set(self.special_token_ids)
        self.tokens = [b"<%d>" % i if i in special else token or b"" for i, token in enumerate(known)]
        self.eos_token_id = eos_token_ids[0]
        self.bos_token_id = None

    def __call__(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False)


def _depth(value: Any, limit: int) -> int:
    """Levels of nested objects and arrays, counted up to `limit`."""
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else None
    if inner is None or limit == 0:
        return 0
    return 1 + max((_depth(part, limit - 1) for part in inner), default=0)
