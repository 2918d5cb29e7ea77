"""Kimi's tokenizer: tiktoken.model, a byte-level BPE for the `tiktoken` library, and tokenizer_config.json.

Such a directory has no tokenizer.json. Its tokenizer is Python code, tokenization_kimi.py, which other programs run with
`trust_remote_code`. This module does the same as class `TikTokenTokenizer` in that file (Moonshot AI; the versions for Kimi-K2
and Kimi-K3 split text alike) with the same library, so the ids are the same.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import tiktoken

from jax_mla_cp.tokenizer.errors import TokenizerError
from jax_mla_cp.tokenizer.tokenizer_config import extra_special_tokens, read_bytes, special_tokens, token_text

# Pre-tokenization: `TikTokenTokenizer.pat_str`. A word is a part of a camelCase name with at most one character before it
# (usually a space); Chinese characters never share a word with other letters.
_SUFFIX = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
_UPPER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]"
_LOWER = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]"
PATTERN = "|".join(
    [
        r"[\p{Han}]+",
        rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_SUFFIX}",
        rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_SUFFIX}",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    ]
)

_NUM_SPECIAL_TOKENS = 256  # with ids after the BPE tokens; not all have names

# Longer texts, and longer runs of white space or of other characters, are split, because tiktoken can fail on them (it panics
# on a million spaces; https://github.com/openai/tiktoken/issues/195). The ids depend on where they are split, so this follows
# TikTokenTokenizer, called by transformers: positions count from the last special token.
_MAX_CHARS = 400_000
_MAX_RUN = 25_000
_RUN = re.compile(r"\s+|\S+")


class KimiVocabulary:
    """A tiktoken.model and its special tokens; see `Vocabulary`."""

    affixes: tuple[tuple[int, ...], tuple[int, ...]] = ((), ())

    def __init__(self, ranks: Mapping[bytes, int], tokenizer_config: Mapping[str, Any]):
        """
        Args:
          ranks: the tokens of the BPE and their ids, 0 to `len(ranks) - 1`.
          tokenizer_config: the contents of tokenizer_config.json, whose `added_tokens_decoder` names the special tokens.

        Raises:
          TokenizerError: the file belongs to another tokenizer, or the ids of special tokens do not follow the BPE's.
        """
        if (tokenizer_class := tokenizer_config.get("tokenizer_class")) != "TikTokenTokenizer":
            raise TokenizerError(
                "tokenizer_config.json",
                f"tokenizer_class={tokenizer_class!r} is not supported with a tiktoken.model, which does "
                "not say how text is split; this is known only for Kimi's TikTokenTokenizer. Add a tokenizer.json.",
            )
        self._encoding = tiktoken.Encoding("kimi", pat_str=PATTERN, mergeable_ranks=dict(ranks), special_tokens={})
        names, hidden = _added_tokens(tokenizer_config, len(ranks))
        specials = {
            i: names.get(i, f"<|reserved_token_{i}|>") for i in range(len(ranks), len(ranks) + _NUM_SPECIAL_TOKENS)
        }
        self._ids = {name: i for i, name in specials.items()}
        longest_first = sorted(self._ids, key=len, reverse=True)
        self._special = re.compile("(" + "|".join(map(re.escape, longest_first)) + ")")
        self._bytes = {i: token for token, i in ranks.items()}
        self._bytes |= {i: name.encode() for i, name in specials.items()}
        self.skipped_tokens = frozenset(i for i, name in specials.items() if name in hidden)

    @classmethod
    def read(cls, path: Path, tokenizer_config: Mapping[str, Any]) -> KimiVocabulary:
        """Reads a tiktoken.model.

        Raises:
          TokenizerError: as for `read_ranks` and the constructor.
        """
        return cls(read_ranks(path), tokenizer_config)

    def encode(self, text: str) -> list[int]:
        ids: list[int] = []
        for i, part in enumerate(self._special.split(text)):
            if i % 2:
                ids.append(self._ids[part])
            else:
                for piece in _split_long(part):
                    ids += self._encoding.encode_ordinary(piece)
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        return b"".join(self._bytes.get(i, b"") for i in ids).decode("utf-8", errors="replace")

    def has_token(self, token: int) -> bool:
        return token in self._bytes

    def token_id(self, token: str) -> int | None:
        return self._ids.get(token)

    def token_bytes(self, token: int) -> bytes | None:
        return None if token in self.skipped_tokens else self._bytes.get(token)

    def last_token(self) -> tuple[str, int]:
        return max(self._ids.items(), key=lambda item: item[1])


def read_ranks(path: Path) -> dict[bytes, int]:
    """Reads a tiktoken.model: a line per token with its bytes in base64 and its rank, which is its id.

    Raises:
      TokenizerError: it can't be read or is a Git LFS pointer, a line is malformed, or tokens or ranks are missing or duplicated.
    """
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(read_bytes(path).splitlines(), 1):
        if not line:
            continue
        encoded, _, rank = line.partition(b" ")
        try:
            token, value = base64.b64decode(encoded, validate=True), int(rank)
        except ValueError as error:  # includes binascii.Error
            raise TokenizerError(str(path), f"line {number} is not a token in base64 and its rank: {error}") from error
        if not token or token in ranks:
            raise TokenizerError(str(path), f"line {number}: the token {token!r} is empty or a duplicate.")
        ranks[token] = value
    if sorted(ranks.values()) != list(range(len(ranks))):
        raise TokenizerError(str(path), f"the ranks of {len(ranks)} tokens must be 0 to {len(ranks) - 1}, each once.")
    if missing := [byte for byte in range(256) if bytes([byte]) not in ranks]:
        raise TokenizerError(str(path), f"no token for the single byte {missing[0]:#04x}; every byte needs one.")
    return ranks


def _added_tokens(tokenizer_config: Mapping[str, Any], first: int) -> tuple[dict[int, str], set[str]]:
    """The names of special tokens by id, and the names of those that decoding omits (`skip_special_tokens`)."""
    where = "tokenizer_config.json: added_tokens_decoder"
    names: dict[int, str] = {}
    hidden = {*special_tokens(tokenizer_config).values(), *extra_special_tokens(tokenizer_config)}
    added = tokenizer_config.get("added_tokens_decoder") or {}
    if not isinstance(added, dict):
        raise TokenizerError(where, f"expected an object, got {type(added).__name__}.")
    for key, token in added.items():
        name = token_text(token)
        if not (key.isdecimal() and first <= int(key) < first + _NUM_SPECIAL_TOKENS and name):
            raise TokenizerError(
                where,
                f"{key!r} is {name!r}; expected ids from {first} (the number of tokens in tiktoken.model) to "
                f"{first + _NUM_SPECIAL_TOKENS - 1}, each with the token's text. Take all files from one checkpoint.",
            )
        if name in names.values():
            raise TokenizerError(where, f"{name!r} has two ids.")
        if isinstance(token, dict):
            if any(token.get(flag) for flag in ("lstrip", "rstrip", "single_word")):
                raise TokenizerError(where, f"{name!r} has lstrip, rstrip or single_word, which are not supported.")
            if token.get("special"):
                hidden.add(name)
        names[int(key)] = name
    return names, hidden


def _split_long(text: str) -> Iterator[str]:
    """Splits text that is too long for tiktoken."""
    for start in range(0, len(text), _MAX_CHARS):
        chunk, begin = text[start : start + _MAX_CHARS], 0
        for run in _RUN.finditer(chunk):
            for end in range(run.start() + _MAX_RUN, run.end(), _MAX_RUN):
                yield chunk[begin:end]
                begin = end
        yield chunk[begin:]
