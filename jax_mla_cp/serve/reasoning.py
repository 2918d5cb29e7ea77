"""Reasoning models: text between <think> and </think> goes to `reasoning_content`, the rest to `content`."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from jax_mla_cp.engine.request import Grammar
from jax_mla_cp.tokenizer import Tokenizer

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
    return tokenizer.decode(prompt[-_TAIL:]).rstrip().endswith(START_TAG)


class ReasoningParser:
    """Splits streamed text into reasoning and content. Reasoning without an end tag stays reasoning.

    White space after a tag belongs to neither.

    Args:
      in_reasoning: the prompt already ends with <think>.
    """

    def __init__(self, *, in_reasoning: bool):
        self._next_tag: str | None = END_TAG if in_reasoning else START_TAG
        """The tag to look for; None: the content has begun."""
        self._buffer = ""
        self._after_tag = in_reasoning

    def push(self, delta: str) -> tuple[str, str]:
        """Adds text and returns the (reasoning, content) that is certain by now; either may be empty."""
        self._buffer += delta
        reasoning = ""
        if self._next_tag == START_TAG:
            text = self._buffer.lstrip()
            if len(text) < len(START_TAG) and START_TAG.startswith(text):
                return "", ""
            if text.startswith(START_TAG):
                self._buffer, self._next_tag, self._after_tag = text.removeprefix(START_TAG), END_TAG, True
            else:
                self._next_tag, self._after_tag = None, False
        if self._next_tag == END_TAG:
            reasoning, found, rest = self._skip_white_space().partition(END_TAG)
            if found:
                self._buffer, self._next_tag, self._after_tag = rest, None, True
            else:
                keep = next(n for n in range(len(END_TAG) - 1, -1, -1) if reasoning.endswith(END_TAG[:n]))
                reasoning, self._buffer = reasoning[: len(reasoning) - keep], reasoning[len(reasoning) - keep :]
                return reasoning, ""
        content, self._buffer = self._skip_white_space(), ""
        return reasoning, content

    def flush(self) -> tuple[str, str]:
        """The buffered rest, at the end of the output."""
        rest, self._buffer = self._buffer, ""
        return (rest, "") if self._next_tag == END_TAG else ("", rest)

    def _skip_white_space(self) -> str:
        """The buffer without white space directly after a tag."""
        text = self._buffer.lstrip() if self._after_tag else self._buffer
        self._after_tag = self._after_tag and not text
        return text


class GrammarAfterReasoning:
    """Applies a grammar from the </think> token on. Implements `jax_mla_cp.engine.Grammar`."""

    def __init__(self, grammar: Grammar, end_token: int, vocab_size: int):
        self._grammar = grammar
        self._end_token = end_token
        self._allow_all = np.full(-(-vocab_size // 32), 2**32 - 1, np.uint32)
        self._reasoning = True

    def mask(self) -> NDArray[np.uint32]:
        return self._allow_all if self._reasoning else self._grammar.mask()

    def accept(self, token: int) -> None:
        if not self._reasoning:
            self._grammar.accept(token)
        elif token == self._end_token:
            self._reasoning = False

    @property
    def finished(self) -> bool:
        return not self._reasoning and self._grammar.finished
