"""Text to token ids and back, by a Hugging Face directory's tokenizer.json."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers

from jax_mla_cp.config import ConfigError

_REPLACEMENT = "\ufffd"  # what a decoder puts for bytes that are no code point, or not yet one
# U+FFFD at a text's end that a next token may still turn into a code point: 3 bytes that lack the fourth, and because
# byte-fallback decoders reject a run of bytes as a whole, the 4 bytes of a code point just before.
_LONGEST_TAIL = 7
_WINDOW = 32  # tokens that `Detokenizer` decodes again before it looks for a place to cut


class TokenizerError(ConfigError):
    """A tokenizer that is absent, or does not fit its own settings or the model."""


class Tokenizer:
    """A tokenizer and the special tokens that a text is wrapped in."""

    def __init__(self, backend: tokenizers.Tokenizer, *, prefix: Sequence[int] = (), suffix: Sequence[int] = ()):
        self._backend = backend
        self.prefix, self.suffix = tuple(prefix), tuple(suffix)

    @classmethod
    def from_dir(cls, directory: str | Path, vocab_size: int) -> Tokenizer | None:
        """Reads tokenizer.json and tokenizer_config.json; None if there is no tokenizer.json.

        `add_bos_token` and `add_eos_token` decide when they are given; otherwise tokenizer.json's post-processor does.

        Args:
          vocab_size: the model's; every token must be one that it knows.

        Raises:
          TokenizerError: a file that can't be read, a token beyond the vocabulary, a flag whose token is missing.
        """
        path = Path(directory) / "tokenizer.json"
        if not path.is_file():
            return None
        try:
            backend = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises a bare Exception
            raise TokenizerError(f"{path}: not a tokenizer that the tokenizers library reads: {error}") from error
        token, largest = max(
            backend.get_vocab(with_added_tokens=True).items(), key=lambda item: item[1], default=("", -1)
        )
        if largest >= vocab_size:
            raise TokenizerError(
                f"{path}: token {token!r} has id {largest}, but the model's vocab_size is {vocab_size}. "
                "Use the tokenizer that belongs to the model."
            )
        settings = _read_settings(path.with_name("tokenizer_config.json"))
        prefix, suffix = _post_processor(backend)
        prefix = _wrapping(settings, "bos", backend, default=prefix)
        suffix = _wrapping(settings, "eos", backend, default=suffix)
        backend.no_padding()
        backend.no_truncation()
        return cls(backend, prefix=prefix, suffix=suffix)

    def encode(self, text: str) -> list[int]:
        """Token ids, with the BOS and EOS tokens that the tokenizer's settings ask for."""
        return [*self.prefix, *self._backend.encode(text, add_special_tokens=False).ids, *self.suffix]

    def decode(self, ids: Sequence[int]) -> str:
        """Text without special tokens; ids that the tokenizer does not know are no text."""
        return self._backend.decode(list(ids), skip_special_tokens=True)


def require_tokenizer(tokenizer: Tokenizer | None) -> Tokenizer:
    """For whatever needs text.

    Raises:
      TokenizerError: the model has none.
    """
    if tokenizer is None:
        raise TokenizerError(
            "the model directory has no tokenizer.json, so text can't be tokenized. Send the prompt as token ids, or "
            "put a tokenizer.json there (transformers: AutoTokenizer.from_pretrained(..).save_pretrained(DIR))."
        )
    return tokenizer


class Detokenizer:
    """The text of one request, piece by piece as its tokens come.

    A piece never ends within a code point. The pieces and `finish`'s add up to `Tokenizer.decode` of all tokens.
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


def _read_settings(path: Path) -> Mapping[str, Any]:
    if not path.is_file():
        return {}
    try:
        settings = json.loads(path.read_text())
    except (ValueError, OSError) as error:
        raise TokenizerError(f"{path}: not readable as JSON: {error}") from error
    if not isinstance(settings, dict):
        raise TokenizerError(f"{path}: expected a JSON object, got {type(settings).__name__}.")
    return settings


def _post_processor(backend: tokenizers.Tokenizer) -> tuple[list[int], list[int]]:
    """What tokenizer.json itself puts before and after a text."""
    bare = backend.encode("a", add_special_tokens=False).ids
    full = backend.encode("a", add_special_tokens=True).ids
    for start in range(len(full) - len(bare) + 1):
        if full[start : start + len(bare)] == bare:
            return full[:start], full[start + len(bare) :]
    raise TokenizerError("tokenizer.json: its post-processor changes the text's own tokens, which is not supported.")


def _wrapping(
    settings: Mapping[str, Any], which: str, backend: tokenizers.Tokenizer, *, default: list[int]
) -> list[int]:
    """The tokens for `add_bos_token` or `add_eos_token`; `default` where the flag is not given."""
    flag = settings.get(f"add_{which}_token")
    if flag is None:
        return default
    if not flag:
        return []
    token = settings.get(f"{which}_token")
    content = token.get("content") if isinstance(token, dict) else token
    number = backend.token_to_id(content) if isinstance(content, str) else None
    if number is None:
        raise TokenizerError(
            f"tokenizer_config.json: add_{which}_token is true, but {which}_token={content!r} is no token of "
            f"tokenizer.json. Set {which}_token to one, or add_{which}_token to false."
        )
    return [number]
