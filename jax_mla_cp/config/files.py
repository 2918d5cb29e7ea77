"""The files of a model directory: JSON objects, and the pointers that Git LFS leaves where a file was not downloaded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from jax_mla_cp.config.errors import ConfigError

_MAX_POINTER_BYTES = 1024
_POINTER = (b"version https://git-lfs.github.com/spec/", b"version https://hawser.github.com/spec/")


def lfs_problem(path: Path) -> str | None:
    """The problem of a file that is a Git LFS pointer, and its fix; None for any other file, and for none.

    A pointer is a text of less than 1024 bytes whose first line is its version (docs/spec.md of git-lfs).
    """
    try:
        if path.stat().st_size >= _MAX_POINTER_BYTES or not path.read_bytes().startswith(_POINTER):
            return None
    except OSError:
        return None  # whoever reads the file says why
    return (
        f"a Git LFS pointer, not the file itself: the repository was cloned without its large files. Run `git lfs pull` in "
        f"{path.parent}."
    )


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object; an absent file counts as empty.

    Raises:
      ConfigError: it is a Git LFS pointer, or not a JSON object.
    """
    if not path.is_file():
        return {}
    if problem := lfs_problem(path):
        raise ConfigError(str(path), problem)
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise ConfigError(str(path), f"not readable as JSON: {error}") from error
    if not isinstance(raw, dict):
        raise ConfigError(str(path), f"expected a JSON object, got {type(raw).__name__}.")
    return raw
