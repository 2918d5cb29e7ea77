"""Kimi's tokenizer: tiktoken.model, a byte-level BPE for the `tiktoken` library, and tokenizer_config.json.

Such a directory has no tokenizer.json; its tokenizer is Python code, tokenization_kimi.py, that others run with
`trust_remote_code`. This does what class `TikTokenTokenizer` of that file does (Moonshot AI; the files of Kimi-K2's time and
of Kimi-K3's divide text alike), and the library is the same, so the ids are the same.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import tiktoken

from jax_mla_cp.tokenizer.errors import TokenizerError
from jax_mla_cp.tokenizer.settings import special_tokens, token_text

# How text is divided before BPE: `TikTokenTokenizer.pat_str`. Words are camelCase's parts, with one character before them
# (a space, most often); Chinese characters are never in a word with other letters.
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

_SPECIALS = 256  # ids behind the BPE's that are special tokens, with a name or without

# Longer texts, and longer runs of white space or of anything else, are cut, because tiktoken can fail on them (it panics
# on a million spaces; https://github.com/openai/tiktoken/issues/195). The ids show it, so the cuts are TikTokenTokenizer's:
# counted from the last special token, as when transformers calls it.
_MAX_CHARS = 400_000
_MAX_RUN = 25_000
_RUN = re.compile(r"\s+|\S+")


class KimiVocabulary:
    """A tiktoken.model and its special tokens; see `Vocabulary`."""

    wrapping: tuple[tuple[int, ...], tuple[int, ...]] = ((), ())

    def __init__(self, ranks: Mapping[bytes, int], settings: Mapping[str, Any]):
        """
        Args:
          ranks: every token of the BPE and its id, 0 to `len(ranks) - 1`.
          settings: tokenizer_config.json; its `added_tokens_decoder` names the special tokens.

        Raises:
          TokenizerError: another tokenizer's settings, or special tokens that are not right behind the BPE's.
        """
        if (kind := settings.get("tokenizer_class")) != "TikTokenTokenizer":
            raise TokenizerError(
                "tokenizer_config.json",
                f"tokenizer_class={kind!r}, but a tiktoken.model says nothing of how text is "
                "divided, which is known for Kimi's TikTokenTokenizer alone. Put a tokenizer.json beside it.",
            )
        self._encoding = tiktoken.Encoding("kimi", pat_str=PATTERN, mergeable_ranks=dict(ranks), special_tokens={})
        named, hidden = _added_tokens(settings, len(ranks))
        specials = {i: named.get(i, f"<|reserved_token_{i}|>") for i in range(len(ranks), len(ranks) + _SPECIALS)}
        self._ids = {name: i for i, name in specials.items()}
        longest_first = sorted(self._ids, key=len, reverse=True)
        self._special = re.compile("(" + "|".join(map(re.escape, longest_first)) + ")")
        self._bytes = {i: token for token, i in ranks.items()}
        self._bytes |= {i: name.encode() for i, name in specials.items() if name not in hidden}

    @classmethod
    def read(cls, path: Path, settings: Mapping[str, Any]) -> KimiVocabulary:
        """
        Raises:
          TokenizerError: as `read_ranks` and the constructor.
        """
        return cls(read_ranks(path), settings)

    def encode(self, text: str) -> list[int]:
        ids: list[int] = []
        for i, part in enumerate(self._special.split(text)):
            if i % 2:
                ids.append(self._ids[part])
            else:
                for piece in _pieces(part):
                    ids += self._encoding.encode_ordinary(piece)
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        return b"".join(self._bytes.get(i, b"") for i in ids).decode("utf-8", errors="replace")

    def token_id(self, token: str) -> int | None:
        return self._ids.get(token)

    def token_bytes(self, token: int) -> bytes | None:
        return self._bytes.get(token)

    def last(self) -> tuple[str, int]:
        return max(self._ids.items(), key=lambda item: item[1])


def read_ranks(path: Path) -> dict[bytes, int]:
    """Reads a tiktoken.model: a line per token, its bytes as base64 and its rank, which is its id.

    Raises:
      TokenizerError: it can't be read, a line is not of that form, or ranks or tokens are missing or double.
    """
    ranks: dict[bytes, int] = {}
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise TokenizerError(str(path), f"not readable: {error}") from error
    for number, line in enumerate(lines, 1):
        if not line:
            continue
        encoded, _, rank = line.partition(b" ")
        try:
            token, value = base64.b64decode(encoded, validate=True), int(rank)
        except ValueError as error:  # binascii.Error is one
            raise TokenizerError(str(path), f"line {number} is not a token in base64 and its rank: {error}") from error
        if not token or token in ranks:
            raise TokenizerError(str(path), f"line {number}: the token {token!r} is empty or was in an earlier line.")
        ranks[token] = value
    if sorted(ranks.values()) != list(range(len(ranks))):
        raise TokenizerError(str(path), f"the ranks of {len(ranks)} tokens must be 0 to {len(ranks) - 1}, each once.")
    if missing := [byte for byte in range(256) if bytes([byte]) not in ranks]:
        raise TokenizerError(str(path), f"no token for the single byte {missing[0]:#04x}; any text must have tokens.")
    return ranks


def _added_tokens(settings: Mapping[str, Any], first: int) -> tuple[dict[int, str], set[str]]:
    """The names of special tokens by id, and those that are no text in an answer (`skip_special_tokens`)."""
    where = "tokenizer_config.json: added_tokens_decoder"
    named: dict[int, str] = {}
    hidden = {*special_tokens(settings).values(), *_texts(settings.get("additional_special_tokens"))}
    added = settings.get("added_tokens_decoder") or {}
    if not isinstance(added, dict):
        raise TokenizerError(where, f"expected an object, got {type(added).__name__}.")
    for key, token in added.items():
        name = token_text(token)
        if not (key.isdecimal() and first <= int(key) < first + _SPECIALS and name):
            raise TokenizerError(
                where,
                f"{key!r} is {name!r}; expected ids from {first} (the number of tokens in tiktoken.model) to "
                f"{first + _SPECIALS - 1}, each with the token's text. Take all files from one checkpoint.",
            )
        if name in named.values():
            raise TokenizerError(where, f"{name!r} has two ids.")
        if isinstance(token, dict):
            if any(token.get(flag) for flag in ("lstrip", "rstrip", "single_word")):
                raise TokenizerError(where, f"{name!r} has lstrip, rstrip or single_word, which are not supported.")
            if token.get("special"):
                hidden.add(name)
        named[int(key)] = name
    return named, hidden


def _texts(tokens: Any) -> list[str]:
    return [text for text in map(token_text, tokens or ()) if text is not None]


def _pieces(text: str) -> Iterator[str]:
    """The text in pieces that tiktoken takes."""
    for start in range(0, len(text), _MAX_CHARS):
        chunk, done = text[start : start + _MAX_CHARS], 0
        for run in _RUN.finditer(chunk):
            for cut in range(run.start() + _MAX_RUN, run.end(), _MAX_RUN):
                yield chunk[done:cut]
                done = cut
        yield chunk[done:]
