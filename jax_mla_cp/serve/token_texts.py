"""Tokens as clients read them."""

from __future__ import annotations

from jax_mla_cp.tokenizer import Tokenizer


class TokenNames:
    """What tokens are called in log-probabilities. Remembered: the same few thousand come again and again."""

    def __init__(self, tokenizer: Tokenizer | None):
        self._tokenizer = tokenizer
        self._names: dict[int, str] = {}

    def __call__(self, token: int) -> str:
        """Its text; where that says too little (half a code point, a special token), its number, as vLLM writes it."""
        if (name := self._names.get(token)) is None:
            text = self._tokenizer.decode([token]) if self._tokenizer else ""
            name = self._names[token] = text if text and "\ufffd" not in text else f"token_id:{token}"
        return name

    def bytes(self, token: int) -> list[int] | None:
        """Its bytes, of which a client can put code points together; None for special tokens."""
        found = self._tokenizer.token_bytes(token) if self._tokenizer else None
        return None if found is None else list(found)
