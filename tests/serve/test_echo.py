"""Places of an echoed prompt's tokens in the client's text, also where the tokenizer's text is another."""

from __future__ import annotations

import time
from typing import Any

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers, pre_tokenizers

from jax_mla_cp.serve.echo import Echo, locate
from jax_mla_cp.serve.schemas.completions import CompletionRequest
from jax_mla_cp.tokenizer import JsonVocabulary, Tokenizer
from tests.helpers.vocabularies import BYTE_LEVEL, KIMI


class Served:
    """The part of a `ServedModel` that an echo asks for."""

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer = tokenizer


def letters(normalizer: Any = None) -> Tokenizer:
    """A token for a, b, c and the space, one for all others, and <sep>, which takes the white space after it."""
    vocab = {"<unk>": 0, "a": 1, "b": 2, "c": 3, " ": 4}
    backend = tokenizers.Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split(tokenizers.Regex(r"[\s\S]"), "isolated")
    backend.decoder = decoders.Fuse()
    if normalizer is not None:
        backend.normalizer = normalizer
    backend.add_special_tokens([tokenizers.AddedToken("<sep>", rstrip=True, normalized=False)])
    return Tokenizer(JsonVocabulary(backend))


def offsets(tokenizer: Tokenizer, text: str) -> list[int]:
    body = CompletionRequest(model="tiny", prompt=text)
    echo = Echo(Served(tokenizer), body, text, tokenizer.encode(text))  # type: ignore[arg-type]
    assert echo.text == text
    return echo.offsets()


@pytest.mark.parametrize(
    ("text", "want"),
    [
        ("abc", [0, 1, 2]),
        ("aéb", [0, 1, 2]),
        ("éèbé", [0, 1, 2, 3]),
        ("a<sep>  bc", [0, 1, 8, 9]),
        ("a<sep>éb<sep> c", [0, 1, 6, 7, 8, 14]),
    ],
)
def test_unknown_and_special_tokens_are_as_long_as_the_client_spelled_them(text: str, want: list[int]) -> None:
    assert offsets(letters(), text) == want


def test_a_space_that_only_the_tokenizer_has_takes_no_place() -> None:
    assert offsets(letters(normalizers.Prepend(" ")), "abc") == [0, 0, 1, 2]


def test_a_character_that_becomes_several_tokens_does_not_move_the_next() -> None:
    tokenizer = letters(normalizers.NFD())
    assert len(tokenizer.encode("açb")) == 4  # c and a mark, which is unknown
    assert offsets(tokenizer, "açbçac") == [0, 1, 2, 2, 3, 4, 4, 5]


def test_many_unknown_tokens_in_a_row_keep_their_places() -> None:
    text = "a" + "é" * 300 + "bc"
    assert offsets(letters(), text) == list(range(len(text)))


@given(st.text(alphabet="ab €😀日\n", max_size=12), st.sampled_from([BYTE_LEVEL, KIMI]))
def test_a_byte_level_text_is_divided_at_its_code_points(text: str, tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode(text)
    want, read = [], b""
    for token in ids:
        want.append(len(read.decode(errors="ignore")))
        read += tokenizer.token_bytes(token) or b""
    assert read.decode() == text and offsets(tokenizer, text) == want


@given(st.lists(st.text(alphabet="ab <", max_size=4), max_size=8), st.lists(st.text(alphabet="ab <", max_size=4)))
def test_offsets_grow_within_the_text(parts: list[str], others: list[str]) -> None:
    text = "".join(parts)
    assert locate(text, parts) == [len("".join(parts[:i])) for i in range(len(parts))]
    found = locate(text, others)
    assert found == sorted(found) and all(0 <= at <= len(text) for at in found)


def test_pieces_that_the_text_lacks_take_linear_time() -> None:
    text, began = "a" * 200_000, time.monotonic()
    assert locate(text, ["b"] * len(text)) == list(range(len(text)))
    assert time.monotonic() - began < 5, "a search of all the text takes minutes"
