"""Which special tokens have text: as the libraries decode them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import tiktoken
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders
from transformers import PreTrainedTokenizerFast

from jax_mla_cp.tokenizer import JsonVocabulary, Tokenizer, kimi
from tests.helpers.vocabularies import KIMI, KIMI_SPECIALS, byte_fallback, byte_level, kimi_ranks, with_markers


def metaspace() -> tokenizers.Tokenizer:
    backend = byte_fallback()
    backend.decoder = decoders.Metaspace()
    return backend


def without_decoder() -> tokenizers.Tokenizer:
    backend = byte_fallback()
    backend.decoder = None  # type: ignore[assignment]
    return backend


BACKENDS = [byte_level, byte_fallback, metaspace, without_decoder]
KINDS = pytest.mark.parametrize("make", BACKENDS)
IDS = st.lists(st.integers(0, 340) | st.integers(255, 265) | st.integers(328, 336), max_size=20)


def id_of(backend: tokenizers.Tokenizer, token: str) -> int:
    found = backend.token_to_id(token)
    assert found is not None
    return found


@KINDS
def test_as_the_tokenizers_library(make: Callable[[], tokenizers.Tokenizer]) -> None:
    """Spaces and byte tokens around a special token are as if the library had been told that it is not special."""
    backend = with_markers(make())
    shown_backend = with_markers(make(), special={"<s>"})
    ours, call = Tokenizer(JsonVocabulary(backend)), id_of(backend, "<|call|>")

    @settings(max_examples=300, deadline=None)
    @given(IDS)
    def check(ids: list[int]) -> None:
        every = backend.decode(ids, skip_special_tokens=False)
        assert ours.decode(ids) == backend.decode(ids, skip_special_tokens=True)
        assert ours.decode(ids, skip_special_tokens=False) == every
        assert ours.decode(ids, shown=frozenset({call})) == shown_backend.decode(ids, skip_special_tokens=True)
        assert ours.decode(ids, shown=ours.skipped_tokens()) == every

    check()
    mixed = [id_of(backend, "<s>"), 257, call, 258, id_of(backend, "<think>")]
    texts = [ours.decode(mixed, shown=shown) for shown in (frozenset[int](), frozenset({call}), ours.skipped_tokens())]
    assert [[name in text for name in ("<s>", "<|call|>", "<think>")] for text in texts] == [
        [False, False, True],
        [False, True, True],
        [True, True, True],
    ]


@pytest.mark.parametrize("make", [byte_level, byte_fallback])
@pytest.mark.parametrize("spaces", [True, False])
def test_as_transformers(make: Callable[[], tokenizers.Tokenizer], spaces: bool) -> None:
    """Its `spaces_between_special_tokens` changes nothing for a tokenizer.json."""
    backend = with_markers(make())
    ours, theirs = Tokenizer(JsonVocabulary(backend)), PreTrainedTokenizerFast(tokenizer_object=backend)
    first = id_of(backend, "<s>")
    for ids in ([first, first, 257, first + 1, first + 2, 258, first], [257, first + 1, 257]):
        for skip in (True, False):
            text = theirs.decode(ids, skip_special_tokens=skip, spaces_between_special_tokens=spaces)
            assert ours.decode(ids, skip_special_tokens=skip) == text


@settings(max_examples=300, deadline=None)
@given(st.lists(st.integers(0, len(kimi_ranks()) + 255), max_size=20))
def test_as_kimis_own_decode(ids: list[int]) -> None:
    """`TikTokenTokenizer.decode` is tiktoken's, with the names of all 256 special tokens."""
    assert KIMI.decode(ids, skip_special_tokens=False) == KIMIS_ENCODING.decode(ids)
    assert KIMI.decode(ids) == KIMIS_ENCODING.decode([token for token in ids if token not in KIMI.skipped_tokens()])


_first = len(kimi_ranks())
KIMIS_ENCODING = tiktoken.Encoding(
    "reference",
    pat_str=kimi.PATTERN,
    mergeable_ranks=kimi_ranks(),
    special_tokens={KIMI_SPECIALS.get(i, f"<|reserved_token_{_first + i}|>"): _first + i for i in range(256)},
)


def test_kimis_special_tokens() -> None:
    ids = KIMI.encode("<|im_assistant|>hello<|tool_calls_section_begin|>[EOT]<|im_end|>")
    assistant, end = KIMI.token_id("<|im_assistant|>"), KIMI.token_id("<|im_end|>")
    assert assistant is not None and end is not None
    assert KIMI.decode(ids) == "hello<|tool_calls_section_begin|>"
    assert KIMI.decode(ids, shown=frozenset({end})) == "hello<|tool_calls_section_begin|><|im_end|>"
    every = "<|im_assistant|>hello<|tool_calls_section_begin|>[EOT]<|im_end|>"
    assert KIMI.decode(ids, skip_special_tokens=False) == every
    assert KIMI.token_bytes(end) is None and KIMI.token_bytes(ids[-3]) == b"<|tool_calls_section_begin|>"
    assert [KIMI.has_token(i) for i in (0, _first + 255, _first + 256)] == [True, True, False]
