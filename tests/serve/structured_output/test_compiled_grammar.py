"""Masks for each kind of tokenizer."""

from __future__ import annotations

import json

import numpy as np
import pytest

from jax_mla_cp.engine import GrammarError
from jax_mla_cp.serve.structured_output import ContextFreeGrammar, Grammars, JsonSchema
from jax_mla_cp.tokenizer import JsonVocabulary, KimiVocabulary, Tokenizer
from tests.helpers.byte_tokenizer import EOS, byte_tokenizer
from tests.helpers.vocabularies import byte_fallback, byte_level, kimi, with_markers
from tests.serve.structured_output.walking import GRAMMARS, allowed

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


@pytest.mark.parametrize("kind", ["byte-level", "byte-fallback", "kimi"])
def test_only_what_the_schema_allows(kind: str) -> None:
    """Any walk through the masks is an answer of the schema, in bytes; ends come at its end and nowhere else."""
    tokenizer, end = tokenizers()[kind]
    vocab_size = 1000  # more than the tokenizers have, as models do
    grammar = Grammars(tokenizer, vocab_size, [end]).compile(JsonSchema(SCHEMA))
    mask = grammar.mask()
    assert mask.dtype == np.uint32 and mask.shape == (-(-vocab_size // 32),)
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
    grammar = GRAMMARS.compile(JsonSchema({"type": "integer"}))
    assert EOS not in allowed(grammar)
    grammar.accept(ord("7"))
    assert EOS in allowed(grammar) and ord("1") in allowed(grammar) and not grammar.finished
    grammar.accept(EOS)
    assert grammar.finished


def test_what_is_not_allowed_is_not_accepted() -> None:
    grammar = GRAMMARS.compile(JsonSchema({"type": "integer"}))
    with pytest.raises(GrammarError, match="token 120 is not allowed here"):
        grammar.accept(ord("x"))


@pytest.mark.parametrize(
    ("vocabulary", "names"),
    [
        # a special token, and one that is added but not special
        (JsonVocabulary(with_markers(byte_level())), ("<|call|>", "<think>")),
        (kimi(), ("<|im_middle|>", "<|tool_calls_section_begin|>")),
    ],
    ids=["json", "kimi"],
)
def test_tokens_of_a_grammar_by_name_and_id(
    vocabulary: JsonVocabulary | KimiVocabulary, names: tuple[str, ...]
) -> None:
    """A token in a grammar is that token and no text, and text is never a special token."""
    tokenizer = Tokenizer(vocabulary)
    end = vocabulary.token_id("</s>") or vocabulary.token_id("[EOS]")
    assert end is not None
    grammars = Grammars(tokenizer, 1000, [end])
    for name in names:
        token = vocabulary.token_id(name)
        assert token is not None
        for written in (name, f"<[{token}]>"):
            grammar = grammars.compile(ContextFreeGrammar(f'start: {written} "x"'))
            assert allowed(grammar, 1000) == [token]
            grammar.accept(token)
            assert token not in allowed(grammar, 1000)
    special = vocabulary.token_id(names[0])
    grammar = grammars.compile(ContextFreeGrammar(f'start: "{names[0]}" | /(?s:.*)x/'))
    assert special not in allowed(grammar, 1000) and len(allowed(grammar, 1000)) > 100
    with pytest.raises(GrammarError, match="names the token <nothing>, which this model does not have"):
        grammars.compile(ContextFreeGrammar("start: <nothing>"))


def test_a_schema_that_turns_out_too_ambiguous_fails_its_own_answer() -> None:
    schema = {"anyOf": [{"type": "object", "properties": {f"k{i}": {"maxLength": 9}}} for i in range(1000)]}
    grammar = GRAMMARS.compile(JsonSchema(schema))
    with pytest.raises(GrammarError, match=r"can't be continued: .* too many alternatives"):
        grammar.accept(ord("{"))


def test_a_model_without_text_or_end() -> None:
    for tokenizer, ends in ((None, [EOS]), (byte_tokenizer(), [])):
        with pytest.raises(GrammarError, match="no tokenizer or no EOS token"):
            Grammars(tokenizer, 259, ends).compile(JsonSchema(SCHEMA))
