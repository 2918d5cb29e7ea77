"""tokenizer.json, by the `tokenizers` library."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import tokenizers

from jax_mla_cp.tokenizer.errors import TokenizerError


class JsonVocabulary:
    """A tokenizer.json; see `Vocabulary`."""

    def __init__(self, backend: tokenizers.Tokenizer):
        self._backend = backend
        backend.no_padding()
        backend.no_truncation()
        self.wrapping = _post_processor(backend)

    @classmethod
    def parse(cls, contents: bytes, source: str | Path = "tokenizer.json") -> JsonVocabulary:
        """
        Args:
          source: what error messages call it.

        Raises:
          TokenizerError: the library does not read it, or its post-processor changes more than a text's two ends.
        """
        try:
            backend = tokenizers.Tokenizer.from_buffer(contents)
        except Exception as error:  # the library raises a bare Exception
            raise TokenizerError(f"{source}: not a tokenizer that the tokenizers library reads: {error}") from error
        return cls(backend)

    def encode(self, text: str) -> list[int]:
        return self._backend.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Sequence[int]) -> str:
        return self._backend.decode(list(ids), skip_special_tokens=True)

    def token_id(self, token: str) -> int | None:
        return self._backend.token_to_id(token)

    def last(self) -> tuple[str, int]:
        tokens = self._backend.get_vocab(with_added_tokens=True)
        return max(tokens.items(), key=lambda item: item[1], default=("", -1))


def _post_processor(backend: tokenizers.Tokenizer) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """What tokenizer.json itself puts before and after a text."""
    bare = backend.encode("a", add_special_tokens=False).ids
    full = backend.encode("a", add_special_tokens=True).ids
    for start in range(len(full) - len(bare) + 1):
        if full[start : start + len(bare)] == bare:
            return tuple(full[:start]), tuple(full[start + len(bare) :])
    raise TokenizerError("tokenizer.json: its post-processor changes the text's own tokens, which is not supported.")
