"""A reasoning model's thoughts, which it writes between <think> and </think> before it answers."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from jax_mla_cp.engine.request import Grammar
from jax_mla_cp.tokenizer import Tokenizer

OPEN, CLOSE = "<think>", "</think>"
_TAIL = 8  # tokens at a prompt's end in which a template's <think> and white space behind it are looked for


def reasons(tokenizer: Tokenizer) -> bool:
    """Whether the model has such tags: its template writes them, or they are tokens."""
    template = tokenizer.chat_template
    if template is not None and CLOSE in template.source:
        return True
    return tokenizer.token_id(OPEN) is not None and tokenizer.token_id(CLOSE) is not None


def opened(tokenizer: Tokenizer, prompt: Sequence[int]) -> bool:
    """Whether the prompt ends with <think>, as DeepSeek-R1's template ends it: then the answer begins with thoughts."""
    return tokenizer.decode(prompt[-_TAIL:]).rstrip().endswith(OPEN)


class Splitter:
    """Divides a text, as its pieces come, into thoughts and answer. Thoughts without an end are thoughts.

    White space behind a tag belongs to neither.
    """

    def __init__(self, *, opened: bool):
        self._tag: str | None = CLOSE if opened else OPEN
        """The tag that is looked for; None: the answer has begun."""
        self._held = ""
        self._behind_tag = opened

    def push(self, piece: str) -> tuple[str, str]:
        """What is certain now to be of the thoughts and of the answer; either may be empty."""
        self._held += piece
        thoughts = ""
        if self._tag == OPEN:
            start = self._held.lstrip()
            if len(start) < len(OPEN) and OPEN.startswith(start):
                return "", ""
            self._enter(start.removeprefix(OPEN), CLOSE) if start.startswith(OPEN) else self._enter(self._held, None)
            self._behind_tag = self._tag is not None
        if self._tag == CLOSE:
            thoughts, found, rest = self._visible().partition(CLOSE)
            if found:
                self._enter(rest, None)
                self._behind_tag = True
            else:
                keep = next(n for n in range(len(CLOSE) - 1, -1, -1) if thoughts.endswith(CLOSE[:n]))
                thoughts, self._held = thoughts[: len(thoughts) - keep], thoughts[len(thoughts) - keep :]
                return thoughts, ""
        answer, self._held = self._visible(), ""
        return thoughts, answer

    def finish(self) -> tuple[str, str]:
        """What is still held back, at the end."""
        rest, self._held = self._held, ""
        return (rest, "") if self._tag == CLOSE else ("", rest)

    def _enter(self, text: str, tag: str | None) -> None:
        self._held, self._tag = text, tag

    def _visible(self) -> str:
        """What is held, without white space right behind a tag."""
        text = self._held.lstrip() if self._behind_tag else self._held
        self._behind_tag = self._behind_tag and not text
        return text


class AfterThoughts:
    """A grammar that holds from the token </think> on. Implements `jax_mla_cp.engine.Grammar`."""

    def __init__(self, grammar: Grammar, close: int, vocab_size: int):
        self._grammar = grammar
        self._close = close
        self._anything = np.full(-(-vocab_size // 32), 2**32 - 1, np.uint32)
        self._thinking = True

    def mask(self) -> NDArray[np.uint32]:
        return self._anything if self._thinking else self._grammar.mask()

    def accept(self, token: int) -> None:
        if not self._thinking:
            self._grammar.accept(token)
        elif token == self._close:
            self._thinking = False

    @property
    def finished(self) -> bool:
        return not self._thinking and self._grammar.finished
