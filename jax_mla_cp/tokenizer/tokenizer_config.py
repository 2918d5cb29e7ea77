"""tokenizer_config.json: reading it, and the special tokens in it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jax_mla_cp.tokenizer.errors import TokenizerError

_SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


def read_tokenizer_config(path: Path) -> Mapping[str, Any]:
    """Reads tokenizer_config.json; an absent file counts as empty.

    Raises:
      TokenizerError: it can't be read, or is not a JSON object.
    """
    if not path.is_file():
        return {}
    try:
        config = json.loads(read_text(path))
    except ValueError as error:
        raise TokenizerError(str(path), f"not valid JSON: {error}") from error
    if not isinstance(config, dict):
        raise TokenizerError(str(path), f"expected a JSON object, got {type(config).__name__}.")
    return config


def read_text(path: Path) -> str:
    """Reads a text file.

    Raises:
      TokenizerError: it can't be read, or is not UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8")
    except (ValueError, OSError) as error:
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
    """
    found = {name: token_text(config.get(name)) for name in _SPECIAL_TOKENS}
    return {name: text for name, text in found.items() if text is not None}
