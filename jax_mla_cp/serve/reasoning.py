"""Reasoning models: text between <think> and </think> goes to `reasoning_content`, the rest to `content`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from jax_mla_cp.engine.request import Grammar
from jax_mla_cp.tokenizer import Tokenizer

ReasoningFormat = Literal["auto", "think", "none"]
"""think: <think> .. </think>, the format of DeepSeek, Kimi and GLM; auto: if the model knows the tags."""
START_TAG, END_TAG = "<think>", "</think>"
_TAIL = 8  # prompt tokens that are decoded to find a template's <think> and the white space after it


def is_reasoning_model(tokenizer: Tokenizer) -> bool:
    """True if the chat template writes </think>, or both tags are tokens of the vocabulary."""
    template = tokenizer.chat_template
    if template is not None and END_TAG in template.source:
        return True
    return tokenizer.token_id(START_TAG) is not None and tokenizer.token_id(END_TAG) is not None


def prompt_starts_reasoning(tokenizer: Tokenizer, prompt: Sequence[int]) -> bool:
    """True if the prompt ends with <think>, as with DeepSeek-R1's template: the output then starts inside the reasoning."""
    return tokenizer.decode(prompt[-_TAIL:], skip_special_tokens=False).rstrip().endswith(START_TAG)


class ReasoningParser:
    """Splits streamed text into reasoning and content. Reasoning without an end tag stays reasoning.

    White space after a tag belongs to neither.

    Args:
      in_reasoning: the prompt already ends with <think>.
      also_ends: texts that end the reasoning as </think> does, and begin the content: the start of tool calls, before which
        models forget the tag (Kimi K2 does).
    """

    def __init__(self, *, in_reasoning: bool, also_ends: Sequence[str] = ()):
        self._next_tag: str | None = END_TAG if in_reasoning else START_TAG
        """The tag to look for; None: the content has begun."""
        self._ends = (END_TAG, *also_ends)
        self._blank: list[str] = []
        """White space before what may be <think>. It belongs to the content if it is not."""
        self._buffer = ""
        self._after_tag = in_reasoning

    def push(self, delta: str) -> tuple[str, str]:
        """Adds text and returns the (reasoning, content) that is certain by now; either may be empty."""
        if self._next_tag == START_TAG and not self._buffer:
            text = delta.lstrip()
            self._blank.append(delta[: len(delta) - len(text)])
            delta = text
        self._buffer += delta
        reasoning = ""
        if self._next_tag == START_TAG:
            if len(self._buffer) < len(START_TAG) and START_TAG.startswith(self._buffer):
                return "", ""
            if self._buffer.startswith(START_TAG):
                self._buffer, self._next_tag, self._after_tag = self._buffer.removeprefix(START_TAG), END_TAG, True
            else:
                self._buffer, self._next_tag = "".join([*self._blank, self._buffer]), None
            self._blank = []
        if self._next_tag == END_TAG:
            text = self._skip_white_space()
            found = min(((at, end) for end in self._ends if (at := text.find(end)) >= 0), default=None)
            if found is None:
                keep = max(_overlap(text, end) for end in self._ends)
                self._buffer = text[len(text) - keep :]
                return text[: len(text) - keep], ""
            at, end = found
            reasoning, self._buffer, self._next_tag = text[:at], text[at:].removeprefix(END_TAG), None
            self._after_tag = end == END_TAG
        content, self._buffer = self._skip_white_space(), ""
        return reasoning, content

    def flush(self) -> tuple[str, str]:
        """The buffered rest, at the end of the output."""
        rest, self._blank, self._buffer = "".join([*self._blank, self._buffer]), [], ""
        return (rest, "") if self._next_tag == END_TAG else ("", rest)

    def _skip_white_space(self) -> str:
        """The buffer without white space directly after a tag."""
        text = self._buffer.lstrip() if self._after_tag else self._buffer
        self._after_tag = self._after_tag and not text
        return text


def _overlap(text: str, tag: str) -> int:
    """Length of the longest suffix of the text that is a proper prefix of the tag."""
    return next(n for n in range(len(tag) - 1, -1, -1) if text.endswith(tag[:n]))


def _bits(tokens: Collection[int], words: int) -> NDArray[np.uint32]:
    """A mask of these tokens alone."""
    mask = np.zeros(words, np.uint32)
    for token in tokens:
        mask[token // 32] |= np.uint32(1 << token % 32)
    return mask


@dataclasses.dataclass(frozen=True)
class ReasoningStart:
    """The beginning of reasoning that the prompt has not begun: <think>, perhaps after white space."""

    token: int
    is_blank: Callable[[int], bool]
    """True for tokens that the parser sees as white space or not at all, such as hidden special tokens."""


class ReasoningGrammar:
    """Constrains an output that reasons first: the reasoning ends with </think>, never with EOS and after at most `budget`
    tokens, and a grammar applies from there on. Implements `jax_mla_cp.engine.Grammar`.

    Args:
      grammar: of the content, and of white space before <think>. None: free text, in which EOS may end the reasoning too.
      start: the output may begin with <think>. None: the prompt ends with it.
      budget: maximum number of tokens between the tags. None: no limit.
      eos_tokens: the stop tokens, which would end the output without content.
      also_ends: tokens that end the reasoning as </think> does, but begin the content.
    """

    def __init__(
        self,
        grammar: Grammar | None,
        *,
        end_token: int,
        vocab_size: int,
        start: ReasoningStart | None = None,
        budget: int | None = None,
        eos_tokens: Collection[int] = (),
        also_ends: Collection[int] = (),
    ):
        self._grammar = grammar
        self._end_token = end_token
        self._also_ends = frozenset(also_ends)
        self._left = budget
        words = -(-vocab_size // 32)
        self._only_end = _bits([end_token], words)
        self._inside = ~_bits(eos_tokens if grammar is not None else (), words)
        self._start = start
        """None: the reasoning has begun, or the content has."""
        self._only_start = _bits([] if start is None else [start.token], words)
        self._reasoning = start is None

    def mask(self) -> NDArray[np.uint32] | None:
        if self._reasoning:
            return self._only_end if self._left == 0 else self._inside
        mask = None if self._grammar is None else self._grammar.mask()
        return mask if mask is None or self._start is None else mask | self._only_start

    def accept(self, token: int) -> None:
        start = self._start
        if not self._reasoning:
            if start is not None and token == start.token:
                self._start, self._reasoning = None, True
                return
            if start is not None and not start.is_blank(token):
                self._start = None
            if self._grammar is not None:
                self._grammar.accept(token)
            return
        if self._left is not None:
            self._left -= 1
        if token == self._end_token:
            self._reasoning = False
        elif token in self._also_ends:
            self._reasoning = False
            if self._grammar is not None:
                self._grammar.accept(token)

    @property
    def finished(self) -> bool:
        return not self._reasoning and self._grammar is not None and self._grammar.finished
