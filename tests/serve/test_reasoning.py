"""Reasoning under a grammar and a token budget, and its end where </think> is missing."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import httpx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jax_mla_cp.serve.reasoning import ReasoningGrammar, ReasoningParser, ReasoningStart
from tests.helpers.scripted_model import Script, serving_script

START, END, EOS, CALL, BLANK, VOCAB = 3, 4, 5, 6, 8, 70
BEGIN = ReasoningStart(START, lambda token: token == BLANK)


class OnlyEven:
    """A grammar of even tokens, which ends with 10."""

    finished = False

    def __init__(self) -> None:
        self.accepted: list[int] = []

    def mask(self) -> np.ndarray:
        return np.full(3, 0x55555555, np.uint32)

    def accept(self, token: int) -> None:
        self.accepted.append(token)
        self.finished = token == 10


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
    grammar.accept(10)
    assert grammar.finished and inner.accepted == [10]


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
    for before in ([], [BLANK, BLANK]):
        grammar = ReasoningGrammar(None, end_token=END, vocab_size=VOCAB, start=BEGIN, budget=1)
        for token in (*before, START):
            assert grammar.mask() is None
            grammar.accept(token)
        grammar.accept(1)
        assert allowed(grammar) == {END}
    other = ReasoningGrammar(None, end_token=END, vocab_size=VOCAB, start=BEGIN, budget=1)
    for token in (BLANK, 1, START, 1, 1):
        other.accept(token)
    assert other.mask() is None, "reasoning begins before anything but white space, or not at all"


def test_a_grammar_lets_the_reasoning_begin() -> None:
    inner = OnlyEven()
    grammar = ReasoningGrammar(inner, end_token=END, vocab_size=VOCAB, start=BEGIN)
    even = set(range(0, VOCAB, 2))
    assert START not in even and allowed(grammar) == even | {START}
    grammar.accept(BLANK)
    assert allowed(grammar) == even | {START} and inner.accepted == [BLANK]
    grammar.accept(START)
    assert allowed(grammar) == set(range(VOCAB))
    grammar.accept(1)
    grammar.accept(END)
    assert allowed(grammar) == even and inner.accepted == [BLANK]
    other = ReasoningGrammar(OnlyEven(), end_token=END, vocab_size=VOCAB, start=BEGIN)
    other.accept(2)
    assert allowed(other) == even


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


@pytest.mark.parametrize(
    ("content", "script"),
    [
        ("open", "One two three."),
        ("say", "<think>One two three."),
        ("say", " \n<think>One two three."),
        ("say", "<|bos|>\n<think>One two three."),
    ],
)
def test_a_budget_cuts_the_reasoning(thinker: tuple[Script, str], content: str, script: str) -> None:
    message = ask(thinker, script, content, thinking_token_budget=7)["message"]
    assert message["reasoning_content"] == "One two" and message["content"]
    assert ask(thinker, f"{script}</think>Yes.", content, thinking_token_budget=30)["message"] == {
        "role": "assistant",
        "content": "Yes.",
        "reasoning_content": "One two three.",
    }


def test_a_budget_where_nothing_reasons_is_refused() -> None:
    with serving_script(Script(pages=100), reasoning_parser="none") as url:
        body = {"model": "tiny", "messages": [{"role": "user", "content": "Hi"}], "thinking_token_budget": 3}
        answer = httpx.post(f"{url}/v1/chat/completions", json=body)
        assert answer.status_code == 400 and answer.json()["error"]["param"] == "thinking_token_budget"
        assert "does not reason" in answer.json()["error"]["message"]


@pytest.fixture(scope="module")
def caller() -> Iterator[tuple[Script, str]]:
    """As `thinker`, with a format of tool calls."""
    model = Script(has_think_tokens=True, pages=400, max_running=4)
    with serving_script(model, tool_parser="deepseek_v31") as url:
        yield model, url


def test_strict_tools_let_the_model_think_first(caller: tuple[Script, str]) -> None:
    """<think> is a token that the grammar of the calls does not know."""
    parameters = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
    tool = {"type": "function", "function": {"name": "f", "parameters": parameters, "strict": True}}
    call = '<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>f<｜tool▁sep｜>{"a": 1}<｜tool▁call▁end｜><｜tool▁calls▁end｜>'
    for script in (f"<think>Hm.</think>{call}", f"\n<think>Hm.</think>{call}"):
        message = ask(caller, script, "say", tools=[tool], max_tokens=400)["message"]
        assert message["reasoning_content"] == "Hm." and message["content"] is None
        assert message["tool_calls"][0]["function"] == {"name": "f", "arguments": '{"a": 1}'}
    late = ask(caller, f"Hi <think>{call}", "say", tools=[tool], max_tokens=400)["message"]
    assert "reasoning_content" not in late, "reasoning begins before anything but white space"
    held = ask(caller, call.replace("1", '"x"'), "say", tools=[tool], max_tokens=400)["message"]
    assert '"x"' not in str(held), "the grammar holds without reasoning, too"


def test_white_space_takes_linear_time_and_comes_back() -> None:
    blank = [" "] * 100_000
    for end, want in (("<think>a</think>b", ("a", "b")), ("<thin", ("", " " * 100_000 + "<thin"))):
        parser = ReasoningParser(in_reasoning=False)
        began = time.monotonic()
        parts = [*(parser.push(piece) for piece in [*blank, *end]), parser.flush()]
        assert time.monotonic() - began < 5, "a quadratic parser takes minutes"
        assert ("".join(r for r, _ in parts), "".join(c for _, c in parts)) == want


@given(
    st.lists(
        st.sampled_from(["Hm", " ", "\n", "<", "<think>", "</think>", "</thi", "<|call|>", "<|ca", "x"]), max_size=8
    ),
    st.integers(1, 6),
)
def test_streamed_is_whole(pieces: list[str], size: int) -> None:
    text = "".join(pieces)

    def split(step: int, in_reasoning: bool = True) -> tuple[str, str]:
        parser = ReasoningParser(in_reasoning=in_reasoning, also_ends=("<|call|>",))
        parts = [parser.push(text[i : i + step]) for i in range(0, len(text), step)] + [parser.flush()]
        return "".join(r for r, _ in parts), "".join(c for _, c in parts)

    reasoning, content = split(size)
    assert (reasoning, content) == split(max(1, len(text)))
    assert split(size, False) == split(max(1, len(text)), False)
    ends = [(at, end) for end in ("</think>", "<|call|>") if (at := text.find(end)) >= 0]
    at, end = min(ends, default=(len(text), ""))
    assert reasoning == text[:at].lstrip()
    assert content == (text[at:] if end == "<|call|>" else text[at + len(end) :].lstrip())
