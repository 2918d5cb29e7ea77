"""Walks a grammar over the bytes of texts."""

from __future__ import annotations

from typing import Any

from jax_mla_cp.engine import Grammar, GrammarError
from jax_mla_cp.serve.structured_output import Constraint, Grammars, JsonSchema
from tests.helpers.byte_tokenizer import EOS, byte_tokenizer

VOCAB_SIZE = 259
GRAMMARS = Grammars(byte_tokenizer(), VOCAB_SIZE, [EOS])


def allowed(grammar: Grammar, vocab_size: int = VOCAB_SIZE) -> list[int]:
    mask = grammar.mask()
    if mask is None:
        return list(range(vocab_size))
    return [t for t in range(vocab_size) if int(mask[t // 32]) >> t % 32 & 1]


def accepts(constraint: Constraint | dict[str, Any], text: str) -> bool:
    """True if the text is a whole answer."""
    grammar = GRAMMARS.compile(JsonSchema(constraint) if isinstance(constraint, dict) else constraint)
    for byte in text.encode():
        if byte not in allowed(grammar):
            return False
        grammar.accept(byte)
    return EOS in allowed(grammar)


def refusal(constraint: Constraint | dict[str, Any]) -> str:
    """The error text; empty if the constraint is taken."""
    try:
        GRAMMARS.compile(JsonSchema(constraint) if isinstance(constraint, dict) else constraint)
    except GrammarError as error:
        return str(error)
    return ""
