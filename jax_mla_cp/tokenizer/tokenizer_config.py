"""tokenizer_config.json: reading it, with the older files beside it, and the special tokens in it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jax_mla_cp.config.files import lfs_problem
from jax_mla_cp.tokenizer.errors import TokenizerError

_SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_EXTRA = ("additional_special_tokens", "extra_special_tokens")
"""Lists of further special tokens, by the names of transformers 4 and 5; the second may be an object."""


def read_tokenizer_config(directory: Path) -> Mapping[str, Any]:
    """Reads tokenizer_config.json, and into it what special_tokens_map.json and added_tokens.json add. Absent files count as empty.

    Follows `PreTrainedTokenizerBase._from_pretrained` of transformers. Since 4.34 tokenizer_config.json is complete, which its
    `added_tokens_decoder` shows. In older directories special_tokens_map.json overrides it, and added_tokens.json has the ids
    of added tokens. One difference: a special token that a newer tokenizer_config.json does not mention is also taken from
    special_tokens_map.json, which transformers then ignores.

    Raises:
      TokenizerError: a file can't be read, or is not a JSON object.
    """
    config = _read_object(directory / "tokenizer_config.json")
    tokens_map = _read_object(directory / "special_tokens_map.json")
    tokens = {key: tokens_map[key] for key in (*_SPECIAL_TOKENS, *_EXTRA) if tokens_map.get(key) is not None}
    if config.get("added_tokens_decoder") is not None:
        return tokens | config
    merged = config | tokens
    if added := _read_object(directory / "added_tokens.json"):
        merged["added_tokens_decoder"] = _added_tokens_decoder(added, merged)
    return merged


def _added_tokens_decoder(added: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """added_tokens.json, {token: id}, in the newer form, {id: token}."""
    special = {*special_tokens(config).values(), *extra_special_tokens(config)}
    for token, i in added.items():
        if isinstance(i, bool) or not isinstance(i, int) or i < 0:
            raise TokenizerError("added_tokens.json", f"{token!r}: expected a token id, got {i!r}.")
    return {
        str(i): {"content": token, "special": token in special, "normalized": token not in special}
        for token, i in added.items()
    }


def _read_object(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        found = json.loads(read_text(path))
    except ValueError as error:
        if isinstance(error, TokenizerError):
            raise
        raise TokenizerError(str(path), f"not valid JSON: {error}") from error
    if not isinstance(found, dict):
        raise TokenizerError(str(path), f"expected a JSON object, got {type(found).__name__}.")
    return found


def read_bytes(path: Path) -> bytes:
    """Reads a file.

    Raises:
      TokenizerError: it can't be read, or is a Git LFS pointer.
    """
    if problem := lfs_problem(path):
        raise TokenizerError(str(path), problem)
    try:
        return path.read_bytes()
    except OSError as error:
        raise TokenizerError(str(path), f"can't be read: {error}") from error


def read_text(path: Path) -> str:
    """Reads a text file.

    Raises:
      TokenizerError: it can't be read, is a Git LFS pointer, or is not UTF-8.
    """
    try:
        return read_bytes(path).decode("utf-8")
    except UnicodeDecodeError as error:
        raise TokenizerError(str(path), f"can't be read as UTF-8 text: {error}") from error


def token_text(token: Any) -> str | None:
    """The text of a token in tokenizer_config.json, where it is a string or an object with `content`.

    >>> token_text({"content": "<s>", "lstrip": False})
    '<s>'
    """
    content = token.get("content") if isinstance(token, dict) else token
    return content if isinstance(content, str) else None


def special_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    """The special tokens by role.

    >>> special_tokens({"bos_token": {"content": "<s>"}, "eos_token": "</s>", "unk_token": None})
    {'bos_token': '<s>', 'eos_token': '</s>'}

    Raises:
      TokenizerError: one is neither a string nor an object with `content`.
    """
    found: dict[str, str] = {}
    for role in _SPECIAL_TOKENS:
        if config.get(role) is None:
            continue
        text = token_text(config[role])
        if text is None:
            raise TokenizerError(
                "tokenizer_config.json", f"{role}: expected a string or an object with content, got {config[role]!r}."
            )
        found[role] = text
    return found


def extra_special_tokens(config: Mapping[str, Any]) -> list[str]:
    """The special tokens without a role.

    >>> extra_special_tokens({"additional_special_tokens": ["<a>"], "extra_special_tokens": {"image_token": "<b>"}})
    ['<a>', '<b>']

    Raises:
      TokenizerError: they are not lists, or objects, of tokens.
    """
    found: list[str] = []
    for key in _EXTRA:
        tokens = config.get(key) or []
        values = list(tokens.values()) if isinstance(tokens, dict) else tokens
        if not isinstance(values, list) or any(token_text(token) is None for token in values):
            raise TokenizerError("tokenizer_config.json", f"{key}: expected a list of tokens, got {tokens!r}.")
        found += [text for text in map(token_text, values) if text is not None]
    return found


def added_tokens(config: Mapping[str, Any]) -> dict[int, dict[str, Any]]:
    """The tokens of `added_tokens_decoder` by id, each an object with `content`.

    Raises:
      TokenizerError: it is not an object of ids and tokens.
    """
    where = "tokenizer_config.json: added_tokens_decoder"
    added = config.get("added_tokens_decoder") or {}
    if not isinstance(added, dict):
        raise TokenizerError(where, f"expected an object, got {type(added).__name__}.")
    for key, token in added.items():
        if not key.isdecimal() or not token_text(token):
            raise TokenizerError(where, f"expected ids, each with the token's text, got {key!r}: {token!r}.")
    return {int(key): token if isinstance(token, dict) else {"content": token} for key, token in added.items()}
