"""tokenizer_config.json."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jax_mla_cp.tokenizer.errors import TokenizerError

_SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


def read_settings(path: Path) -> Mapping[str, Any]:
    """The file's contents; none if it is not there.

    Raises:
      TokenizerError: it is no JSON object, or can't be read.
    """
    if not path.is_file():
        return {}
    try:
        settings = json.loads(read_text(path))
    except ValueError as error:
        raise TokenizerError(str(path), f"not readable as JSON: {error}") from error
    if not isinstance(settings, dict):
        raise TokenizerError(str(path), f"expected a JSON object, got {type(settings).__name__}.")
    return settings


def read_text(path: Path) -> str:
    """
    Raises:
      TokenizerError: the file can't be read, or is not UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8")
    except (ValueError, OSError) as error:
        raise TokenizerError(str(path), f"not readable as UTF-8 text: {error}") from error


def token_text(token: Any) -> str | None:
    """A token that is written as its text, or as an object with its text as `content`."""
    content = token.get("content") if isinstance(token, dict) else token
    return content if isinstance(content, str) else None


def special_tokens(settings: Mapping[str, Any]) -> dict[str, str]:
    """The text of `bos_token`, `eos_token` and their like, where the settings have one."""
    found = {name: token_text(settings.get(name)) for name in _SPECIAL_TOKENS}
    return {name: text for name, text in found.items() if text is not None}
