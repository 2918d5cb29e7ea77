"""A request's tokens to text, up to a stop string."""

from __future__ import annotations

from collections.abc import Sequence

from jax_mla_cp.tokenizer import Detokenizer, Tokenizer


class TextStream:
    """Text as tokens come, never half a code point, never what may yet turn out to begin a stop string.

    Without a tokenizer there is no text.
    """

    def __init__(self, tokenizer: Tokenizer | None, stop: Sequence[str] = ()):
        self._detokenizer = Detokenizer(tokenizer) if tokenizer else None
        self._stop = tuple(stop)
        self._held = ""
        self.stopped_by: str | None = None
        """The stop string that has come; the text ends before it."""

    @property
    def stopped(self) -> bool:
        return self.stopped_by is not None

    def push(self, token: int, *, may_stop: bool = True) -> str:
        """The text that is certain now. Unless it `may_stop`, no stop string ends or begins in it."""
        if self._detokenizer is None or self.stopped:
            return ""
        piece = self._detokenizer.add(token)
        return self._release(piece) if may_stop else piece

    def finish(self) -> str:
        """What is still held back, at the end; nothing behind a stop string."""
        if self._detokenizer is None or self.stopped:
            return ""
        text = self._release(self._detokenizer.finish())
        if self.stopped:
            return text
        rest, self._held = self._held, ""
        return text + rest

    def _release(self, piece: str) -> str:
        text = self._held + piece
        # The match that ends first: so the text does not depend on how it was cut into tokens.
        found = [(at + len(stop), at, stop) for stop in self._stop if (at := text.find(stop)) >= 0]
        if found:
            _, at, self.stopped_by = min(found)  # of those that end together, the longest
            self._held = ""
            return text[:at]
        keep = max((_overlap(text, stop) for stop in self._stop), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]


def _overlap(text: str, stop: str) -> int:
    """Characters at the text's end that begin the stop string."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)
