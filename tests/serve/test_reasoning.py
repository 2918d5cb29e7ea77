"""Reasoning under a grammar and a token budget, and its end where </think> is missing."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jax_mla_cp.serve.reasoning import ReasoningGrammar, ReasoningParser
from tests.helpers.scripted_model import Script, serving_script

START, END, EOS, CALL, VOCAB = 3, 4, 5, 6, 70


class OnlyEven:
    """A grammar of even tokens, which ends with 8."""

    finished = False

    def __init__(self) -> None:
        self.accepted: list[int] = []

    def mask(self) -> np.ndarray:
        return np.full(3, 0x55555555, np.uint32)

    def accept(self, token: int) -> None:
        self.accepted.append(token)
        self.finished = token == 8


def allowed(grammar: ReasoningGrammar) -> set[int]:
    mask = grammar.mask()
    return {t for t in range(VOCAB) if mask is None or int(mask[t // 32]) >> t % 32 & 1}


def test_the_grammar_applies_after_the_reasoning_which_eos_does_not_end() -> None:
    inner = OnlyEven()
    grammar = ReasoningGrammar(inner, end_token=END, vocab_size=VOCAB, eos_tokens=[EOS])
    for token in (1, 7, 2):
        assert allowed(grammar) == set(range(VOCAB)) - {EOS} and not grammar.finished
        grammar.accept(token)
    grammar.accept(END)
    assert allowed(grammar) == set(range(0, VOCAB, 2)) and inner.accepted == []
    grammar.accept(8)
    assert grammar.finished and inner.accepted == [8]


@pytest.mark.parametrize("budget", [0, 1, 3])
def test_a_budget_forces_the_end(budget: int) -> None:
    grammar = ReasoningGrammar(None, end_token=END, vocab_size=VOCAB, budget=budget, eos_tokens=[EOS])
    for _ in range(budget):
        assert allowed(grammar) == set(range(VOCAB))
        grammar.accept(1)
    assert allowed(grammar) == {END}
    grammar.accept(END)
    assert grammar.mask() is None and not grammar.finished
    grammar.accept(1)
    assert grammar.mask() is None


def test_a_budget_counts_from_the_tag_that_the_model_writes() -> None:
    grammar = ReasoningGrammar(None, end_token=END, vocab_size=VOCAB, start_token=START, budget=1)
    assert grammar.mask() is None
    grammar.accept(START)
    grammar.accept(1)
    assert allowed(grammar) == {END}
    other = ReasoningGrammar(None, end_token=END, vocab_size=VOCAB, start_token=START, budget=1)
    for token in (1, START, 1, 1):
        other.accept(token)
    assert other.mask() is None, "reasoning begins with the first token or not at all"


def test_a_call_ends_the_reasoning_and_begins_the_content() -> None:
    inner = OnlyEven()
    grammar = ReasoningGrammar(inner, end_token=END, vocab_size=VOCAB, also_ends=[CALL])
    grammar.accept(1)
    grammar.accept(CALL)
    assert inner.accepted == [CALL] and allowed(grammar) == set(range(0, VOCAB, 2))


@pytest.fixture(scope="module")
def thinker() -> Iterator[tuple[Script, str]]:
    """A model whose tags are tokens, and its server."""
    model = Script(has_think_tokens=True, pages=400, max_running=4)
    with serving_script(model) as url:
        yield model, url


def ask(thinker: tuple[Script, str], script: str, content: str = "open", **fields: Any) -> dict[str, Any]:
    """The only choice."""
    model, url = thinker
    model.script = script
    body = {"model": "tiny", "messages": [{"role": "user", "content": content}], "max_tokens": 40, **fields}
    answer = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=60)
    assert answer.status_code == 200, answer.text
    return answer.json()["choices"][0]


OBJECT = {"response_format": {"type": "json_object"}}


def test_a_constrained_answer_does_not_end_inside_of_its_reasoning(thinker: tuple[Script, str]) -> None:
    free = ask(thinker, "Hm.")
    assert free["finish_reason"] == "stop" and free["message"]["content"] is None
    held = ask(thinker, "Hm.", **OBJECT)
    assert held["finish_reason"] == "length" and held["message"]["content"] is None
    assert held["message"]["reasoning_content"].startswith("Hm.")
    done = ask(thinker, 'Hm.</think>{"a": 1}', **OBJECT)
    assert done["message"] == {"role": "assistant", "content": '{"a": 1}', "reasoning_content": "Hm."}
    assert done["finish_reason"] == "stop"


@pytest.mark.parametrize(("content", "script"), [("open", "One two three."), ("say", "<think>One two three.")])
def test_a_budget_cuts_the_reasoning(thinker: tuple[Script, str], content: str, script: str) -> None:
    message = ask(thinker, script, content, thinking_token_budget=7)["message"]
    assert message["reasoning_content"] == "One two" and message["content"]
    assert ask(thinker, f"{script}</think>Yes.", content, thinking_token_budget=30)["message"] == {
        "role": "assistant",
        "content": "Yes.",
        "reasoning_content": "One two three.",
    }


@given(
    st.lists(st.sampled_from(["Hm", " ", "\n", "<", "</think>", "</thi", "<|call|>", "<|ca", "x"]), max_size=8),
    st.integers(1, 6),
)
def test_streamed_is_whole(pieces: list[str], size: int) -> None:
    text = "".join(pieces)

    def split(step: int) -> tuple[str, str]:
        parser = ReasoningParser(in_reasoning=True, also_ends=("<|call|>",))
        parts = [parser.push(text[i : i + step]) for i in range(0, len(text), step)] + [parser.flush()]
        return "".join(r for r, _ in parts), "".join(c for _, c in parts)

    reasoning, content = split(size)
    assert (reasoning, content) == split(max(1, len(text)))
    ends = [(at, end) for end in ("</think>", "<|call|>") if (at := text.find(end)) >= 0]
    at, end = min(ends, default=(len(text), ""))
    assert reasoning == text[:at].lstrip()
    assert content == (text[at:] if end == "<|call|>" else text[at + len(end) :].lstrip())
