"""Text as it streams: stop strings across tokens, and nothing sent that may yet belong to one."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from jax_mla_cp.engine.text import TextStream
from tests.helpers.byte_tokenizer import byte_tokenizer

texts = st.text(alphabet="ab€😀", max_size=20)


@given(texts, st.lists(st.text(alphabet="ab€", min_size=1, max_size=3), max_size=3))
def test_text_ends_before_the_first_stop_string(text: str, stops: list[str]) -> None:
    stream, pieces = TextStream(byte_tokenizer(), stops), []
    for token in text.encode():
        pieces.append(stream.push(token))
        if stream.stopped:
            break
        # What has been sent stays right whatever comes next: it holds no stop string and no half code point.
        assert text.startswith("".join(pieces))
    sent = "".join(pieces) + stream.finish()
    # The stop string that is complete first, as the bytes come, ends the text where it begins.
    ends = [(text.find(s) + len(s), text.find(s)) for s in stops if s in text]
    first = min((end for end, _ in ends), default=None)
    want = text if first is None else text[: min(start for end, start in ends if end == first)]
    assert sent == want


def test_without_a_tokenizer_there_is_no_text() -> None:
    stream = TextStream(None)
    assert stream.push(5) == "" and stream.finish() == ""


def test_stops_do_not_depend_on_how_the_text_is_cut() -> None:
    for cut in (["abcd"], ["ab", "c", "d"], ["a", "bcd"]):
        stream = TextStream(byte_tokenizer(), ["abcd", "bc"])
        assert "".join(stream._release(piece) if not stream.stopped else "" for piece in cut) == "a"
