"""A model's vocabulary in llguidance's interface."""

from __future__ import annotations

from collections.abc import Sequence

from llguidance import LLTokenizer, TokenizerWrapper

from jax_mla_cp.tokenizer import Tokenizer


def llguidance_vocabulary(tokenizer: Tokenizer, vocab_size: int, eos_token_ids: Sequence[int]) -> LLTokenizer:
    tokens = TokenizerWrapper(_Tokens(tokenizer, vocab_size, eos_token_ids))
    return LLTokenizer(tokens, eos_token=list(eos_token_ids))


class _Tokens:
    """The bytes of each token, and which tokens are special: no text becomes one of them, only its id in a grammar does."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, eos_token_ids: Sequence[int]):
        self._tokenizer = tokenizer
        known = [tokenizer.token_bytes(token) for token in range(vocab_size)]
        self.special_token_ids = sorted({*eos_token_ids, *(i for i, token in enumerate(known) if token is None)})
        special = set(self.special_token_ids)
        # Grammars have special tokens by id (see lark.py), so their names here need not be the model's.
        self.tokens = [b"<%d>" % i if i in special else token or b"" for i, token in enumerate(known)]
        self.eos_token_id = eos_token_ids[0]
        self.bos_token_id = None

    def __call__(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False)
