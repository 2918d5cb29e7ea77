"""Detokenizes a request's output and finds stop strings."""

from __future__ import annotations

from collections.abc import Sequence

from jax_mla_cp.tokenizer import Detokenizer, Tokenizer


class TextStream:
    """Incremental detokenizer with stop strings.

    Text is held back while a code point is incomplete, or while it may begin a stop string. Without a tokenizer there is no
    text.
    """

    def __init__(self, tokenizer: Tokenizer | None, stop: Sequence[str] = ()):
        self._detokenizer = Detokenizer(tokenizer) if tokenizer else None
        self._stop = tuple(stop)
        self._buffer = ""
        self.stopped_by: str | None = None
        """The stop string that was found; the text ends before it."""

    @property
    def stopped(self) -> bool:
        return self.stopped_by is not None

    def push(self, token: int, *, may_stop: bool = True) -> str:
        """Adds a token. Returns the text that is complete now. With `may_stop=False`, stop strings are not looked for."""
        if self._detokenizer is None or self.stopped:
            return ""
        piece = self._detokenizer.add(token)
        return self._release(piece) if may_stop else piece

    def finish(self) -> str:
        """Ends the text. Returns what was held back; nothing after a stop string."""
        if self._detokenizer is None or self.stopped:
            return ""
        text = self._release(self._detokenizer.finish())
        if self.stopped:
            return text
        rest, self._buffer = self._buffer, ""
        return text + rest

    def _release(self, piece: str) -> str:
        text = self._buffer + piece
        # The match that ends first, so that the result does not depend on how the text is divided into tokens.
        found = [(at + len(stop), at, stop) for stop in self._stop if (at := text.find(stop)) >= 0]
        if found:
            _, at, self.stopped_by = min(found)  # the longest of those that end at the same place
            self._buffer = ""
            return text[:at]
        keep = max((_overlap(text, stop) for stop in self._stop), default=0)
        self._buffer = text[len(text) - keep :]
        return text[: len(text) - keep]


def _overlap(text: str, stop: str) -> int:
    """Length of the longest suffix of the text that is a proper prefix of the stop string."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)
