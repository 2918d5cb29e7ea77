"""Grammars for each kind of tokenizer, and schemas that were made to hurt."""

from __future__ import annotations

import json
import time
from typing import Any

import numpy as np
import pytest

from jax_mla_cp.engine import GrammarError
from jax_mla_cp.serve.grammar import MAX_DEPTH, Grammars, JsonGrammar
from jax_mla_cp.serve.reasoning import GrammarAfterReasoning
from jax_mla_cp.tokenizer import JsonVocabulary, KimiVocabulary, Tokenizer
from tests.helpers.byte_tokenizer import EOS, byte_tokenizer
from tests.helpers.vocabularies import byte_fallback, byte_level, kimi

SCHEMA = {
    "type": "object",
    "properties": {"a": {"enum": ["é", "世"]}},
    "required": ["a"],
    "additionalProperties": False,
}


def tokenizers() -> dict[str, tuple[Tokenizer, int]]:
    """Each with its end token."""
    made: dict[str, tuple[JsonVocabulary | KimiVocabulary, str]] = {
        "byte-level": (JsonVocabulary(byte_level()), "</s>"),
        "byte-fallback": (JsonVocabulary(byte_fallback()), "<unk>"),
        "kimi": (kimi(), "[EOS]"),
    }
    found = {name: (Tokenizer(v), v.token_id(end)) for name, (v, end) in made.items()}
    return {name: (tokenizer, end) for name, (tokenizer, end) in found.items() if end is not None}


def allowed(grammar: JsonGrammar | GrammarAfterReasoning, vocab_size: int) -> list[int]:
    mask = grammar.mask()
    assert mask.dtype == np.uint32 and mask.shape == (-(-vocab_size // 32),)
    return [t for t in range(vocab_size) if int(mask[t // 32]) >> t % 32 & 1]


@pytest.mark.parametrize("kind", ["byte-level", "byte-fallback", "kimi"])
def test_only_what_the_schema_allows(kind: str) -> None:
    """Any walk through the masks is an answer of the schema, in bytes; ends come at its end and nowhere else."""
    tokenizer, end = tokenizers()[kind]
    vocab_size = 1000  # more than the tokenizers have, as models do
    grammar = Grammars(tokenizer, vocab_size, [end]).compile(SCHEMA)
    for seed in range(4):
        one, said, rng = grammar.copy(), b"", np.random.default_rng(seed)
        while not one.finished:
            tokens = allowed(one, vocab_size)
            assert tokens and end not in tokens
            token = int(rng.choice(tokens))
            piece = tokenizer.token_bytes(token)
            assert piece, "a special token, or one that the tokenizer doesn't have"
            said += piece
            one.accept(token)
        assert json.loads(said)["a"] in ("é", "世")
        assert allowed(one, vocab_size) == [end]


def test_an_end_where_more_may_follow() -> None:
    grammar = Grammars(byte_tokenizer(), 259, [EOS]).compile({"type": "integer"})
    assert EOS not in allowed(grammar, 259)
    grammar.accept(ord("7"))
    assert EOS in allowed(grammar, 259) and ord("1") in allowed(grammar, 259) and not grammar.finished
    grammar.accept(EOS)
    assert grammar.finished


def test_what_is_not_allowed_is_not_accepted() -> None:
    grammar = Grammars(byte_tokenizer(), 259, [EOS]).compile({"type": "integer"})
    with pytest.raises(GrammarError, match="constrained decoding failed"):
        grammar.accept(ord("x"))


def test_thoughts_are_free_and_the_answer_is_not() -> None:
    grammar = GrammarAfterReasoning(Grammars(byte_tokenizer(), 259, [EOS]).compile({"type": "integer"}), ord("."), 259)
    assert len(allowed(grammar, 259)) == 259
    for token in (*b"let me see", EOS):
        grammar.accept(token)
    assert len(allowed(grammar, 259)) == 259 and not grammar.finished
    grammar.accept(ord("."))
    assert ord("x") not in allowed(grammar, 259) and ord("7") in allowed(grammar, 259)


def nested(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "integer"}
    for _ in range(depth):
        schema = {"type": "array", "items": schema}
    return schema


_DOUBLING = {f"a{i}": {"allOf": [{"anyOf": [{"$ref": f"#/$defs/a{i + 1}"}] * 2}] * 2} for i in range(20)}
HOSTILE: dict[str, Any] = {
    "deep": nested(MAX_DEPTH),
    "long": {"enum": ["a" * 70_000]},
    "remote": {"$ref": "http://127.0.0.1:1/x"},
    "file": {"$ref": "file:///etc/passwd"},
    "loop": {"$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"},
    "loop beside": {"$ref": "#", "allOf": [{"$ref": "#"}]},
    "doubling": {"$defs": {**_DOUBLING, "a20": {"type": "object"}}, "$ref": "#/$defs/a0"},
    "brackets": {"type": "string", "pattern": "(" * 20_000 + ")" * 20_000},
    "no type": {"type": "foo"},
    "no object": {"type": "object", "properties": 5},
    "nothing fits": {"enum": []},
    "unknown": {"type": "string", "format": "zzz"},
}


@pytest.mark.parametrize("name", HOSTILE)
def test_schemas_that_are_refused(name: str) -> None:
    started = time.monotonic()
    with pytest.raises(GrammarError) as error:
        Grammars(byte_tokenizer(), 259, [EOS]).compile(HOSTILE[name])
    assert 5 < len(str(error.value)) <= 500 and time.monotonic() - started < 5


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "string", "pattern": "(a{1,1000}){1,1000}b"},
        {"type": "string", "pattern": ".*a.{900}b.*(x|y).{900}"},
        {"type": "array", "minItems": 10**8, "maxItems": 10**9, "items": {"type": "integer"}},
        {"anyOf": [{"type": "object", "properties": {f"k{i}": {"maxLength": 9}}} for i in range(100)]},
        nested(30),
    ],
)
def test_schemas_that_look_expensive(schema: dict[str, Any]) -> None:
    started = time.monotonic()
    grammar = Grammars(byte_tokenizer(), 259, [EOS]).compile(schema)
    grammar.accept(allowed(grammar, 259)[0])
    assert allowed(grammar, 259)
    assert time.monotonic() - started < 5


def test_a_schema_that_turns_out_too_hard_fails_its_own_answer() -> None:
    schema = {"anyOf": [{"type": "object", "properties": {f"k{i}": {"maxLength": 9}}} for i in range(1000)]}
    grammar = Grammars(byte_tokenizer(), 259, [EOS]).compile(schema)
    with pytest.raises(GrammarError, match="max is 2000"):
        grammar.accept(ord("{"))


def test_a_model_without_text_or_end() -> None:
    for tokenizer, ends in ((None, [EOS]), (byte_tokenizer(), [])):
        with pytest.raises(GrammarError, match="no tokenizer or no EOS token"):
            Grammars(tokenizer, 259, ends).compile(SCHEMA)
