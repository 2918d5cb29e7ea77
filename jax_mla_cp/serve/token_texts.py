"""Token text rendering: token ids as clients read them in log-probabilities."""

from __future__ import annotations

from jax_mla_cp.tokenizer import Tokenizer


class TokenTexts:
    """Maps token ids to text and bytes. Texts are memoized: the same few thousand tokens recur."""

    def __init__(self, tokenizer: Tokenizer | None):
        self._tokenizer = tokenizer
        self._texts: dict[int, str] = {}

    def __call__(self, token: int) -> str:
        """The token's text; `token_id:N`, as in vLLM, for a special token or an incomplete UTF-8 sequence."""
        if (text := self._texts.get(token)) is None:
            decoded = self._tokenizer.decode([token]) if self._tokenizer else ""
            text = self._texts[token] = decoded if decoded and "\ufffd" not in decoded else f"token_id:{token}"
        return text

    @property
    def as_ids(self) -> TokenIds:
        """The same with `token_id:N` for every token."""
        return TokenIds(self._tokenizer)

    def bytes(self, token: int) -> list[int] | None:
        """The token's UTF-8 bytes, from which clients can assemble characters; None for special tokens."""
        found = self._tokenizer.token_bytes(token) if self._tokenizer else None
        return None if found is None else list(found)


class TokenIds(TokenTexts):
    """vLLM's `return_tokens_as_token_ids`: tokens that have the same text stay distinct."""

    def __call__(self, token: int) -> str:
        return f"token_id:{token}"
