"""Text as it streams: stop strings across tokens, and nothing sent that may yet belong to one."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jax_mla_cp.engine.text import TextStream
from tests.helpers.byte_tokenizer import BOS, EOS, byte_tokenizer

texts = st.text(alphabet="ab€😀", max_size=20)
stop_strings = st.lists(st.text(alphabet="ab€", min_size=1, max_size=3), max_size=3)
TOKENIZER = byte_tokenizer()


@given(texts, stop_strings, st.booleans())
def test_text_ends_at_the_first_stop_string(text: str, stops: list[str], include_stop: bool) -> None:
    stream, pieces = TextStream(TOKENIZER, stops, include_stop=include_stop), []
    for token in text.encode():
        pieces.append(stream.push(token))
        if stream.stopped:
            break
        # What has been sent stays right whatever comes next: it holds no stop string and no half code point.
        assert text.startswith("".join(pieces))
    sent = "".join(pieces) + stream.finish()
    # The stop string that is complete first, as the bytes come, ends the text where it begins, or where it ends.
    ends = [(text.find(s) + len(s), text.find(s), s) for s in stops if s in text]
    if not ends:
        assert (sent, stream.stopped_by) == (text, None)
    else:
        end, start, stop = min(ends)
        assert (sent, stream.stopped_by) == (text[: end if include_stop else start], stop)
        assert stream.push(97) == ""


@given(texts, stop_strings)
def test_nothing_is_held_back_for_a_stop_string_that_is_included(text: str, stops: list[str]) -> None:
    stream, sent = TextStream(TOKENIZER, stops, include_stop=True), ""
    for i, token in enumerate(text.encode(), 1):
        sent += stream.push(token)
        if stream.stopped:
            break
        assert sent == text.encode()[:i].decode(errors="ignore")


@given(texts, texts, stop_strings)
def test_stop_strings_are_looked_for_from_where_the_text_may_stop(before: str, after: str, stops: list[str]) -> None:
    """Text before them is sent at once and belongs to no match."""
    stream = TextStream(TOKENIZER, stops)
    assert "".join(stream.push(token, may_stop=False) for token in before.encode()) == before
    alone = TextStream(TOKENIZER, stops)
    for token in after.encode():
        assert stream.push(token) == alone.push(token)
        assert stream.stopped_by == alone.stopped_by
    assert stream.finish() == alone.finish()


@given(texts, stop_strings, st.booleans())
def test_a_place_in_the_text_does_not_depend_on_what_is_held_back(text: str, stops: list[str], include: bool) -> None:
    held, free = TextStream(TOKENIZER, stops, include_stop=include), TextStream(TOKENIZER)
    for i, token in enumerate(text.encode()):
        assert held.num_characters == free.num_characters == len(text.encode()[:i].decode(errors="ignore"))
        held.push(token)
        free.push(token)
        if held.stopped:
            break


def test_without_a_tokenizer_there_is_no_text() -> None:
    stream = TextStream(None)
    assert stream.push(5) == "" and stream.finish() == ""


def test_stops_do_not_depend_on_how_the_text_is_cut() -> None:
    for cut in (["abcd"], ["ab", "c", "d"], ["a", "bcd"]):
        stream = TextStream(TOKENIZER, ["abcd", "bc"])
        assert "".join(stream._release(piece) if not stream.stopped else "" for piece in cut) == "a"


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({}, "ab"),
        ({"skip_special_tokens": False}, "<|bos|>ab<|eos|>"),
        ({"shown_tokens": frozenset({EOS})}, "ab<|eos|>"),
        ({"skip_special_tokens": False, "shown_tokens": frozenset({EOS})}, "<|bos|>ab<|eos|>"),
    ],
)
def test_special_tokens_that_are_shown(options: dict[str, object], text: str) -> None:
    stream = TextStream(TOKENIZER, **options)  # type: ignore[arg-type]
    assert "".join(map(stream.push, [BOS, 97, 98, EOS])) + stream.finish() == text


def test_a_special_token_that_is_shown_can_be_a_stop_string() -> None:
    for shown, text in ((True, "a"), (False, "ab")):
        stream = TextStream(TOKENIZER, ["<|eos|>"], skip_special_tokens=not shown)
        assert "".join(map(stream.push, [97, EOS, 98])) + stream.finish() == text
        assert stream.stopped_by == ("<|eos|>" if shown else None)
