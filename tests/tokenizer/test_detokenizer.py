"""Text as tokens come: it never ends within a code point, and adds up to what decoding all tokens gives."""

from __future__ import annotations

import time
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders

from jax_mla_cp.tokenizer import Detokenizer, JsonVocabulary, Tokenizer
from tests.helpers.vocabularies import BYTE_FALLBACK, BYTE_LEVEL, CORPUS, KIMI, byte_fallback, with_markers

KINDS = pytest.mark.parametrize("tokenizer", [BYTE_LEVEL, KIMI], ids=["json", "kimi"])


LLAMA = Tokenizer(JsonVocabulary(with_markers(byte_fallback())))
_metaspace = with_markers(byte_fallback())
_metaspace.decoder = decoders.Metaspace()
METASPACE = Tokenizer(JsonVocabulary(_metaspace))
FLAGS = st.sampled_from([{}, {"skip_special_tokens": False}, {"shown": True}])


def options(tokenizer: Tokenizer, flags: dict[str, Any]) -> dict[str, Any]:
    """With `shown`, every other special token is."""
    return {"shown": frozenset(sorted(tokenizer.skipped_tokens())[::2])} if "shown" in flags else flags


def pieces(tokenizer: Tokenizer, ids: list[int], **options: Any) -> list[str]:
    stream = Detokenizer(tokenizer, **options)
    return [*(stream.add(token) for token in ids), stream.finish()]


@KINDS
@pytest.mark.parametrize("text", [*CORPUS[:4], "👩‍👩‍👧" * 50, "e\u0301 \ufffd literal", "\n\n  x"])
def test_real_text_has_no_partial_code_points(tokenizer: Tokenizer, text: str) -> None:
    got = pieces(tokenizer, tokenizer.encode(text))
    assert "".join(got) == text
    assert "\ufffd" in text or not any("\ufffd" in piece for piece in got)


@KINDS
@settings(max_examples=200, deadline=None)
@given(st.text(max_size=60))
def test_any_text_comes_back(tokenizer: Tokenizer, text: str) -> None:
    assert "".join(pieces(tokenizer, tokenizer.encode(text))) == text


@KINDS
@settings(max_examples=200, deadline=None)
@given(
    # Beyond the last id, too: a model's padded vocabulary is sampled. Special tokens more often than others.
    st.lists(st.integers(0, 600) | st.integers(328, 350), max_size=120),
    FLAGS,
)
def test_any_ids_stream_to_what_decode_gives(tokenizer: Tokenizer, ids: list[int], flags: dict[str, Any]) -> None:
    chosen = options(tokenizer, flags)
    assert "".join(pieces(tokenizer, ids, **chosen)) == tokenizer.decode(ids, **chosen)


WORDS = st.sampled_from([[257], [258], [259], [259, 259], [260], [261], [262], [9999]])
CHARACTERS = (st.just("\ufffd") | st.characters(exclude_categories=["Cs"])).map(
    lambda char: [byte + 1 for byte in char.encode()]
)


@pytest.mark.parametrize("tokenizer", [LLAMA, METASPACE], ids=["llama", "metaspace"])
@settings(max_examples=300, deadline=None)
@given(st.lists(WORDS | CHARACTERS, max_size=80), FLAGS)
def test_words_with_leading_spaces_stream_to_what_decode_gives(
    tokenizer: Tokenizer, parts: list[list[int]], flags: dict[str, Any]
) -> None:
    ids, chosen = [token for part in parts for token in part], options(tokenizer, flags)
    assert "".join(pieces(tokenizer, ids, **chosen)) == tokenizer.decode(ids, **chosen)


@pytest.mark.parametrize("replacements", [1, 3, 20])
def test_a_replacement_character_is_text(replacements: int) -> None:
    """U+FFFD that the model writes is a code point, complete like any other; after it a run of bytes goes on."""
    text = "\ufffd" * replacements + "\U00010000" * 2
    got = pieces(LLAMA, [byte + 1 for byte in text.encode()])
    assert "".join(got) == text
    assert got[2] == "\ufffd"


@pytest.mark.parametrize("tokenizer", [LLAMA, METASPACE], ids=["llama", "metaspace"])
@pytest.mark.parametrize("textless", [260, 9999], ids=["special", "unknown"])
def test_a_space_survives_many_tokens_without_text(tokenizer: Tokenizer, textless: int) -> None:
    ids = [257, *[textless] * 100, 257]
    assert "".join(pieces(tokenizer, ids)) == tokenizer.decode(ids) == "a a"


@KINDS
def test_a_skipped_token_within_a_code_point(tokenizer: Tokenizer) -> None:
    euro, special = tokenizer.encode("€"), min(tokenizer.skipped_tokens())
    assert len(euro) == 3
    ids = [euro[0], special, *euro[1:]]
    assert pieces(tokenizer, ids) == ["", "", "", "€", ""]
    name = tokenizer.decode([special], skip_special_tokens=False)
    assert pieces(tokenizer, ids, skip_special_tokens=False) == ["", f"\ufffd{name}", "\ufffd", "\ufffd", ""]


@KINDS
def test_nothing_is_held_back_without_need(tokenizer: Tokenizer) -> None:
    stream = Detokenizer(tokenizer)
    for letter in "plain ascii":
        ids = tokenizer.encode(letter)
        assert "".join(stream.add(token) for token in ids) == letter


@KINDS
def test_endless_invalid_bytes_take_linear_time(tokenizer: Tokenizer) -> None:
    token = next(i for i in range(256) if tokenizer.decode([i]) == "\ufffd")
    begin = time.monotonic()
    got = pieces(tokenizer, [token] * 20000)
    assert "".join(got) == tokenizer.decode([token] * 20000)
    assert time.monotonic() - begin < 20


def test_byte_fallback_streams() -> None:
    ids = [257, *(b + 1 for b in "你好😀".encode()), 258, 257, 259, *(b + 1 for b in "é".encode())]
    got = pieces(BYTE_FALLBACK, ids)
    assert "".join(got) == BYTE_FALLBACK.decode(ids) == "a你好😀b a é"
    assert not any("\ufffd" in piece for piece in got)
