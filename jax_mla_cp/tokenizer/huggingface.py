"""tokenizer.json, read by the `tokenizers` library."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers

from jax_mla_cp.tokenizer.errors import TokenizerError
from jax_mla_cp.tokenizer.tokenizer_config import added_tokens, extra_special_tokens, special_tokens

_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")
_BYTE_TOKEN = re.compile("<0x([0-9A-F]{2})>")


def _byte_letters() -> dict[str, bytes]:
    """The byte for each letter of a byte-level BPE (the inverse of GPT-2's `bytes_to_unicode`)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    letters = {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}
    return {letter: bytes([byte]) for letter, byte in letters.items()}


_BYTES = _byte_letters()


class JsonVocabulary:
    """A tokenizer.json; see `Vocabulary`."""

    def __init__(self, backend: tokenizers.Tokenizer, tokenizer_config: Mapping[str, Any] = {}):
        """
        Args:
          tokenizer_config: the contents of tokenizer_config.json, for tokens that tokenizer.json lacks.

        Raises:
          TokenizerError: such a token can't have the id that is given there.
        """
        self._backend = backend
        _add_tokens(backend, tokenizer_config)
        backend.no_padding()
        backend.no_truncation()
        self.affixes = _affixes(backend)
        self._added = backend.get_added_tokens_decoder()
        self.skipped_tokens = frozenset(token for token, added in self._added.items() if added.special)
        decoder = backend.decoder
        self._decoders = set() if decoder is None else set(_decoder_types(json.loads(decoder.__getstate__())))

    @classmethod
    def parse(
        cls, contents: bytes, source: str | Path = "tokenizer.json", tokenizer_config: Mapping[str, Any] = {}
    ) -> JsonVocabulary:
        """Parses the contents of a tokenizer.json.

        Args:
          source: its name in error messages.
          tokenizer_config: as for the constructor.

        Raises:
          TokenizerError: the library can't read it, its post-processor does more than add tokens at both ends of a text, or as
            for the constructor.
        """
        try:
            backend = tokenizers.Tokenizer.from_buffer(contents)
        except Exception as error:  # the library raises a bare Exception
            raise TokenizerError(str(source), f"the tokenizers library can't read it: {error}") from error
        return cls(backend, tokenizer_config)

    def encode(self, text: str) -> list[int]:
        # `encode` would hold the GIL: megabytes of text take seconds, in which no other thread could run.
        ids: list[int] = self._backend.encode_batch_fast([text], add_special_tokens=False)[0].ids
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        return self._backend.decode(list(ids), skip_special_tokens=False)

    def has_token(self, token: int) -> bool:
        return self._backend.id_to_token(token) is not None

    def token_id(self, token: str) -> int | None:
        return self._backend.token_to_id(token)

    def token_bytes(self, token: int) -> bytes | None:
        if (added := self._added.get(token)) is not None:
            return None if added.special else added.content.encode()
        if (piece := self._backend.id_to_token(token)) is None:
            return None
        if "ByteLevel" in self._decoders:
            return b"".join(_BYTES[c] if c in _BYTES else c.encode() for c in piece)
        if "ByteFallback" in self._decoders and (byte := _BYTE_TOKEN.fullmatch(piece)):
            return bytes.fromhex(byte[1])
        return piece.replace("▁", " ").encode()  # SentencePiece writes a space as this letter

    def last_token(self) -> tuple[str, int]:
        tokens = self._backend.get_vocab(with_added_tokens=True)
        return max(tokens.items(), key=lambda item: item[1], default=("", -1))


def _add_tokens(backend: tokenizers.Tokenizer, tokenizer_config: Mapping[str, Any]) -> None:
    """Adds tokens as transformers' `TokenizersBackend` does: those of `added_tokens_decoder` that tokenizer.json lacks; and special
    tokens that are in its vocabulary without being marked as such, so that text would never become them."""
    known = {token.content for token in backend.get_added_tokens_decoder().values()}
    for i, token in sorted(added_tokens(tokenizer_config).items()):
        if token["content"] in known:
            continue
        flags = {flag: token[flag] for flag in _FLAGS if isinstance(token.get(flag), bool)}
        backend.add_tokens([tokenizers.AddedToken(token["content"], **flags)])
        if (got := backend.token_to_id(token["content"])) != i:
            raise TokenizerError(
                "tokenizer_config.json: added_tokens_decoder",
                f"{token['content']!r} has id {i} there, and {got} by tokenizer.json. Take all files from one checkpoint.",
            )
    named = [*special_tokens(tokenizer_config).values(), *extra_special_tokens(tokenizer_config)]
    backend.add_special_tokens([text for text in named if backend.token_to_id(text) is not None])


def _affixes(backend: tokenizers.Tokenizer) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The tokens that the post-processor of tokenizer.json adds before and after a text."""
    bare = backend.encode("a", add_special_tokens=False).ids
    full = backend.encode("a", add_special_tokens=True).ids
    for start in range(len(full) - len(bare) + 1):
        if full[start : start + len(bare)] == bare:
            return tuple(full[:start]), tuple(full[start + len(bare) :])
    raise TokenizerError(
        "tokenizer.json", "its post-processor changes the tokens of the text itself, which is not supported."
    )


def _decoder_types(decoder: Mapping[str, Any]) -> Iterator[str]:
    """Yields the type of a decoder and of its parts."""
    yield decoder["type"]
    for part in decoder.get("decoders", ()):
        yield from _decoder_types(part)
