"""Prompts: exact lengths, the fact where it should be and whole, the question last; and how answers are graded."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jax_mla_cp.config.errors import ConfigError
from jax_mla_cp.default_model import DIRECTORY
from jax_mla_cp.default_model.heldout import heldout_text
from jax_mla_cp.eval.corpus import WINDOW, Corpus, PasskeyPrompt, even_depths
from jax_mla_cp.eval.passkey import Passkey
from jax_mla_cp.tokenizer import Tokenizer, require_tokenizer

TOKENIZER = require_tokenizer(Tokenizer.from_dir(DIRECTORY, 3072))
NEAR = 32


def prose(lines: bool) -> str:
    rng = random.Random(1)
    words = ["".join(rng.choices("abcdefgh", k=rng.randint(2, 9))) for _ in range(4000)]
    return "".join(word + ("\n" if lines and i % rng.randint(2, 3) == 0 else " ") for i, word in enumerate(words))


LINES, RUN_ON = (Corpus(TOKENIZER, prose(lines)) for lines in (True, False))


def bare(text: str) -> list[int]:
    return TOKENIZER.encode(text)[len(TOKENIZER.prefix) :]


def find(tokens: list[int], part: list[int]) -> list[int]:
    return [i for i in range(len(tokens) - len(part) + 1) if tokens[i : i + len(part)] == part]


@settings(max_examples=60, deadline=None)
@given(st.integers(250, 3000), st.floats(0, 1), st.integers(0, 2**40), st.booleans())
def test_every_prompt_has_its_length_its_fact_and_its_question(
    length: int, depth: float, seed: int, lines: bool
) -> None:
    text = LINES if lines else RUN_ON
    prompt = text.prompt(length, depth, seed)
    assert len(prompt.tokens) == length
    assert prompt.tokens[: len(TOKENIZER.prefix)] == list(TOKENIZER.prefix)
    fact, question = bare(f"\n{prompt.passkey.fact()}\n"), bare(f"\n{prompt.passkey.question()}")
    assert prompt.tokens[-len(question) :] == question
    (at,) = find(prompt.tokens, fact)
    before = at - len(TOKENIZER.prefix)
    room = length - len(TOKENIZER.prefix) - len(fact) - len(question)
    assert abs(before - depth * room) <= NEAR + 0.5
    whole = TOKENIZER.decode(prompt.tokens)
    assert whole.count(prompt.passkey.key) == 1, "the text itself has no digits"
    if lines and 0 < before < room:
        assert whole[: whole.index(prompt.passkey.fact()) - 1].endswith("\n"), "cut between two lines"
    assert text.prompt(length, depth, seed) == prompt


def test_depth_0_is_the_start_and_depth_1_just_before_the_question() -> None:
    for length in (250, 1000):
        first, last = (LINES.prompt(length, depth, seed=3) for depth in (0.0, 1.0))
        fact = bare(f"\n{first.passkey.fact()}\n")
        assert find(first.tokens, fact) == [len(TOKENIZER.prefix)]
        end = bare(f"\n{last.passkey.fact()}\n") + bare(f"\n{last.passkey.question()}")
        assert last.tokens[-len(end) :] == end


def test_prompts_differ_by_cell_and_seed_and_not_by_what_else_is_asked() -> None:
    prompts = [LINES.prompt(length, depth, seed) for seed in (0, 1) for length in (300, 400) for depth in (0.0, 0.5)]
    assert len({prompt.passkey for prompt in prompts}) == len(prompts)
    starts = {tuple(prompt.tokens[-200:-150]) for prompt in prompts}
    assert len(starts) == len(prompts), "each from its own place in the text"


def test_no_end_of_text_before_the_question_is_answered() -> None:
    ends = Tokenizer(TOKENIZER._vocabulary, prefix=TOKENIZER.prefix, suffix=[1])
    assert Corpus(ends, prose(True)).prompt(300, 0.5, 0) == LINES.prompt(300, 0.5, 0)


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"lengths: fact and question take \d+ tokens, got 20\."):
        LINES.prompt(20, 0.5, 0)
    with pytest.raises(ConfigError, match=r"lengths: 99999 needs a text of \d+ tokens, it has \d+\."):
        LINES.prompt(99999, 0.5, 0)
    with pytest.raises(ConfigError, match="perplexity_tokens: 99999 needs a text of 99999 tokens"):
        LINES.windows(99999, 5000)


@pytest.mark.parametrize("tokens", [0, 2, 700, WINDOW, WINDOW + 1, 7000])
@pytest.mark.parametrize("longest", [512, 10**6])
def test_windows_are_as_many_tokens_as_asked(tokens: int, longest: int) -> None:
    windows = LINES.windows(tokens, longest)
    assert sum(map(len, windows)) == tokens and bool(windows) is bool(tokens)
    assert all(2 <= len(window) <= min(WINDOW, longest) for window in windows)
    assert all(window[: len(TOKENIZER.prefix)] == list(TOKENIZER.prefix) for window in windows)
    assert len({tuple(window) for window in windows}) == len(windows)


@pytest.mark.parametrize(
    ("completion", "correct"),
    [
        (" 12345.\n", True),
        ("12345", True),
        (" is 12345, and 99", True),
        (" 012345", False),
        (" 123456", False),
        (" 1 12345", False),
        (" 1234", False),
        ("", False),
        (" a number", False),
        (" １２３４５", False),
    ],
)
def test_the_first_number_counts(completion: str, correct: bool) -> None:
    assert PasskeyPrompt(10, 0.0, Passkey("amber falcon", "12345"), []).is_answered_by(completion) is correct


def test_depths_are_even() -> None:
    assert even_depths(2) == [0, 1]
    assert even_depths(10)[1] == pytest.approx(1 / 9)


def test_the_held_out_text_is_long_enough_english() -> None:
    text = heldout_text()
    assert len(text) > 100_000 and text.isprintable() is False
    words = text.split()
    assert words.count("the") > len(words) / 50
    assert "pass key" not in text.lower()
    Corpus(TOKENIZER, text).prompt(16384, 0.5, 0)
