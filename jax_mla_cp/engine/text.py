"""Detokenizes a request's output and finds stop strings."""

from __future__ import annotations

import functools
from collections.abc import Sequence

from jax_mla_cp.engine.stop_strings import START, StopStrings
from jax_mla_cp.tokenizer import Detokenizer, Tokenizer


class TextStream:
    """Incremental detokenizer with stop strings.

    Text is held back while a code point is incomplete, or while it may begin a stop string that is to be left out. Without a
    tokenizer there is no text.
    """

    def __init__(
        self,
        tokenizer: Tokenizer | None,
        stop: Sequence[str] = (),
        *,
        include_stop: bool = False,
        skip_special_tokens: bool = True,
        shown_tokens: frozenset[int] = frozenset(),
    ):
        """
        Args:
          stop: strings that end the text, at least one character each.
          include_stop: keep the stop string, or the text of the stop token, at the end: vLLM's `include_stop_str_in_output`.
          skip_special_tokens, shown_tokens: as `Tokenizer.decode`'s `skip_special_tokens` and `shown`.

        Raises:
          ValueError: a stop string is empty.
        """
        self._detokenizer = (
            Detokenizer(tokenizer, skip_special_tokens=skip_special_tokens, shown=shown_tokens) if tokenizer else None
        )
        self._stops = _automaton(tuple(stop)) if stop else None
        self._state = START
        self._held = ""
        self.num_characters = 0
        """Characters of the tokens' text so far, with those held back or cut off."""
        self.include_stop = include_stop
        self.stopped_by: str | None = None
        """The stop string that was found. The text ends before it, or after it with `include_stop`."""

    @property
    def stopped(self) -> bool:
        return self.stopped_by is not None

    def push(self, token: int, *, may_stop: bool = True) -> str:
        """Adds a token. Returns the text that is complete now. With `may_stop=False`, stop strings are not looked for."""
        if self._detokenizer is None or self.stopped:
            return ""
        piece = self._detokenizer.add(token)
        self.num_characters += len(piece)
        return self._release(piece) if may_stop else piece

    def finish(self) -> str:
        """Ends the text. Returns what was held back; nothing after a stop string."""
        if self._detokenizer is None or self.stopped:
            return ""
        text = self._release(self._detokenizer.finish())
        rest, self._held = self._held, ""
        return text + rest

    def _release(self, piece: str) -> str:
        if self._stops is None or not piece:
            return piece
        # The match that ends first, so that the result does not depend on how the text is divided into tokens.
        self._state, read, self.stopped_by = self._stops.scan(self._state, piece)
        if self.include_stop:
            return piece[:read]
        text = self._held + piece[:read]
        end = len(text) - len(self.stopped_by or "") - (0 if self.stopped else self._stops.pending(self._state))
        self._held = "" if self.stopped else text[end:]
        return text[:end]


@functools.lru_cache(maxsize=8)
def _automaton(stops: tuple[str, ...]) -> StopStrings:
    """The choices of a request have the same stop strings, and often so have all requests of a client."""
    return StopStrings(stops)
