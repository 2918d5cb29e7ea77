"""Incremental detokenization: the text of tokens that arrive one by one."""

from __future__ import annotations

import codecs

from jax_mla_cp.tokenizer.tokenizer import Tokenizer

_REPLACEMENT = "\ufffd"  # stands for bytes that are not, or not yet, a code point
# U+FFFD at the end of a text that stand for an incomplete code point: 3 bytes that lack the fourth, and because byte-fallback
# decoders reject a run of bytes as a whole, the 4 bytes of a code point just before.
_MAX_INCOMPLETE = 7
_WINDOW = 32  # tokens that are decoded again, before `Detokenizer` looks for a place to drop some


class Detokenizer:
    """Decodes the tokens of one request incrementally.

    Text never ends within a code point. The results of `add` and `finish` add up to `Tokenizer.decode` of all tokens, with one
    exception: with byte fallback (Llama's kind of tokenizer.json), invalid UTF-8 changes the text of a whole run of byte
    tokens, of which more than a code point may have been returned.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        skip_special_tokens: bool = True,
        shown: frozenset[int] = frozenset(),
    ):
        """
        Args:
          skip_special_tokens, shown: as for `Tokenizer.decode`.
        """
        self._tokenizer = tokenizer
        self._skipped = tokenizer.skipped_tokens(shown) if skip_special_tokens else frozenset()
        self._ids: list[int] = []  # the latest tokens; the text of a token may depend on those before it
        self._returned = 0  # characters of these tokens' text that have been returned
        self._pending = 0  # tokens since the text last ended with a complete code point
        # Tells an incomplete code point from U+FFFD itself.
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def add(self, token: int) -> str:
        """Returns the text that `token` completes; often empty."""
        # A token without text must not be all that is left of the latest tokens: decoders treat the first token's space apart.
        if token in self._skipped or not self._tokenizer.has_token(token):
            return ""
        self._ids.append(token)
        self._pending += 1
        text = self._decode(self._ids)
        incomplete = 0
        if self._ends_within_code_point(token):
            incomplete = min(len(text) - len(text.rstrip(_REPLACEMENT)), _MAX_INCOMPLETE)
        end = max(len(text) - incomplete, self._returned)
        piece = text[self._returned : end]
        self._returned = end
        if piece and not incomplete:
            self._drop(len(self._ids) - self._pending)
            self._pending = 0
        elif len(self._ids) > _WINDOW and self._separable(_WINDOW // 2, text):
            self._drop(_WINDOW // 2)
        return piece

    def finish(self) -> str:
        """Returns the rest: U+FFFD for the bytes of a code point that remained incomplete."""
        rest = self._decode(self._ids)[self._returned :]
        self._returned += len(rest)
        return rest

    def _ends_within_code_point(self, token: int) -> bool:
        """True if the bytes up to this token, the next one, end with the first bytes of a code point."""
        token_bytes = self._tokenizer.token_bytes(token)
        if token_bytes is None:
            self._utf8.reset()
            return False
        self._utf8.decode(token_bytes)
        return bool(self._utf8.getstate()[0])

    def _drop(self, tokens: int) -> None:
        """Drops the first tokens."""
        length = len(self._decode(self._ids))
        self._ids = self._ids[tokens:]
        self._pending = min(self._pending, len(self._ids))
        self._returned -= length - len(self._decode(self._ids))

    def _separable(self, tokens: int, text: str) -> bool:
        """True if the text of the first tokens has been returned and shares no code point with the rest."""
        first = self._decode(self._ids[:tokens])
        return len(first) <= self._returned and first + self._decode(self._ids[tokens:]) == text

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=False)  # those to skip are not among `ids`
