"""Text as tokens come: it never ends within a code point, and adds up to what decoding all tokens gives."""

from __future__ import annotations

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jax_mla_cp.tokenizer import Detokenizer, Tokenizer
from tests.helpers.vocabularies import BYTE_FALLBACK, BYTE_LEVEL, CORPUS, KIMI

KINDS = pytest.mark.parametrize("tokenizer", [BYTE_LEVEL, KIMI], ids=["json", "kimi"])


def pieces(tokenizer: Tokenizer, ids: list[int]) -> list[str]:
    stream = Detokenizer(tokenizer)
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
@given(st.lists(st.integers(0, 600), max_size=120))  # beyond the last id, too: a model's padded vocabulary is sampled
def test_any_ids_stream_to_what_decode_gives(tokenizer: Tokenizer, ids: list[int]) -> None:
    assert "".join(pieces(tokenizer, ids)) == tokenizer.decode(ids)


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
