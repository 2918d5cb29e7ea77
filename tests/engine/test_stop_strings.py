"""Stop strings by automaton: equal to a search of the whole text, at a cost that does not grow with their number."""

from __future__ import annotations

import itertools
import random
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jax_mla_cp.engine.stop_strings import START, StopStrings

TEXTS = st.text(alphabet="ab€", max_size=40)
STOPS = st.lists(st.text(alphabet="ab€", min_size=1, max_size=6), min_size=1, max_size=8)


def first_match(text: str, stops: list[str]) -> tuple[int, str] | None:
    """The definition: where the match that ends first ends; the longest of those that end there."""
    for end in range(1, len(text) + 1):
        if ending := [stop for stop in stops if text[:end].endswith(stop)]:
            return end, max(ending, key=len)
    return None


def longest_beginning(text: str, stops: list[str]) -> int:
    """The length of the longest end of the text that begins a stop string."""
    beginnings = {stop[:n] for stop in stops for n in range(1, len(stop))}
    return max((n for n in range(1, len(text) + 1) if text[-n:] in beginnings), default=0)


@settings(max_examples=1000, deadline=None)
@given(TEXTS, STOPS, st.lists(st.integers(0, 40), max_size=12))
def test_equal_to_a_search_of_the_whole_text(text: str, stops: list[str], cuts: list[int]) -> None:
    automaton, state, before = StopStrings(stops), START, 0
    bounds = sorted({0, *(min(cut, len(text)) for cut in cuts), len(text)})
    want = first_match(text, stops)
    for begin, end in itertools.pairwise(bounds):
        state, read, stop = automaton.scan(state, text[begin:end])
        before += read
        if stop is not None:
            assert (before, stop) == want
            return
        assert before == end
        assert automaton.pending(state) == longest_beginning(text[:end], stops)
    assert want is None


@settings(max_examples=100, deadline=None)
@given(st.lists(TEXTS, min_size=2, max_size=4), STOPS)
def test_texts_that_share_an_automaton_do_not_affect_each_other(texts: list[str], stops: list[str]) -> None:
    automaton, states = StopStrings(stops), [START] * len(texts)
    found: list[tuple[int, str] | None] = [None] * len(texts)
    for at in range(max(map(len, texts))):
        for i, text in enumerate(texts):
            if found[i] is None and at < len(text):
                states[i], _, stop = automaton.scan(states[i], text[at])
                found[i] = None if stop is None else (at + 1, stop)
    assert found == [first_match(text, stops) for text in texts]


def test_any_character_can_be_in_a_stop_string() -> None:
    for char in ("\0", "\ud800", "\U0010ffff", "\ufffd"):
        automaton = StopStrings([char + "a", "b" + char])
        assert automaton.scan(START, f"a{char}b{char}ab")[1:] == (4, "b" + char)


def test_an_empty_stop_string_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one character"):
        StopStrings(["a", ""])


def seconds_per_scan(stops: list[str], text: str) -> float:
    def once() -> float:
        automaton, state = StopStrings(stops), START
        begin = time.thread_time()
        for at in range(0, len(text), 4):
            state, _, stop = automaton.scan(state, text[at : at + 4])
            assert stop is None
        return time.thread_time() - begin

    return min(once() for _ in range(5)) / (len(text) // 4)


def test_many_stop_strings_cost_what_one_costs() -> None:
    rng = random.Random(0)
    text = "".join(rng.choices("abcdefgh", k=40_000))
    stops = ["".join(rng.choices("abcdefgh", k=40)) for _ in range(64)]
    # Each character begins some of the 64 and an eighth of them begins the one: a few times as much, not 64 times.
    assert seconds_per_scan(stops, text) < 12 * seconds_per_scan(stops[:1], text)


@pytest.mark.parametrize(
    "stops",
    [
        ["".join(random.Random(i).choices("abcdefghijklmnop", k=1024)) for i in range(64)],
        ["a" * 1000 + f"{i:024}" for i in range(64)],
        ["ab" * i + "ba" * (512 - i) for i in range(64)],
        ["a" * i + "b" + "a" * (1023 - i) for i in range(64)],
    ],
    ids=["random", "shared beginnings", "alternating", "runs"],
)
def test_the_longest_stop_strings_take_milliseconds(stops: list[str]) -> None:
    begin = time.thread_time()
    automaton, state = StopStrings(stops), START
    assert time.thread_time() - begin < 0.2
    # A text that reaches every state: in a time that a text of this length is allowed anyway.
    text = "".join(stop[:-1] + "!" for stop in stops)
    begin = time.thread_time()
    for at in range(0, len(text), 4):
        state, _, stop = automaton.scan(state, text[at : at + 4])
        if stop is not None:
            state = START
    assert time.thread_time() - begin < 3
