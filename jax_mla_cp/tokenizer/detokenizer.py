"""The text of tokens that come one by one."""

from __future__ import annotations

from jax_mla_cp.tokenizer.tokenizer import Tokenizer

_REPLACEMENT = "\ufffd"  # what a decoder puts for bytes that are no code point, or not yet one
# U+FFFD at a text's end that a next token may still turn into a code point: 3 bytes that lack the fourth, and because
# byte-fallback decoders reject a run of bytes as a whole, the 4 bytes of a code point just before.
_LONGEST_TAIL = 7
_WINDOW = 32  # tokens that `Detokenizer` decodes again before it looks for a place to cut


class Detokenizer:
    """The text of one request, piece by piece as its tokens come.

    A piece never ends within a code point. The pieces and `finish`'s add up to `Tokenizer.decode` of all tokens; but a
    tokenizer.json with byte fallback (Llama's kind) takes a whole run of byte tokens back for one that is no UTF-8, of
    which pieces can't take back more than a code point.
    """

    def __init__(self, tokenizer: Tokenizer):
        self._decode = tokenizer.decode
        self._ids: list[int] = []  # the last tokens; a decoder may treat a token by what is before it
        self._sent = 0  # how much of these tokens' text has been returned
        self._new = 0  # how many of them came after the last piece that ended with a whole code point

    def add(self, token: int) -> str:
        """The text that `token` completes; often empty."""
        self._ids.append(token)
        self._new += 1
        text = self._decode(self._ids)
        held = min(len(text) - len(text.rstrip(_REPLACEMENT)), _LONGEST_TAIL)
        end = max(len(text) - held, self._sent)
        piece = text[self._sent : end]
        self._sent = end
        if piece and not held:
            self._forget(len(self._ids) - self._new)
            self._new = 0
        elif len(self._ids) > _WINDOW and self._separable(_WINDOW // 2, text):
            self._forget(_WINDOW // 2)
        return piece

    def finish(self) -> str:
        """What is left: the bytes of a code point that never became complete, as U+FFFD."""
        rest = self._decode(self._ids)[self._sent :]
        self._sent += len(rest)
        return rest

    def _forget(self, tokens: int) -> None:
        """Drops the first tokens, and their text from the count."""
        text = len(self._decode(self._ids))
        self._ids = self._ids[tokens:]
        self._new = min(self._new, len(self._ids))
        self._sent -= text - len(self._decode(self._ids))

    def _separable(self, tokens: int, text: str) -> bool:
        """Whether the first tokens' text has been returned and shares no code point with the rest's."""
        first = self._decode(self._ids[:tokens])
        return len(first) <= self._sent and first + self._decode(self._ids[tokens:]) == text
