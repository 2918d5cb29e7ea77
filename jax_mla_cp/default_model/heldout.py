"""The default text of prompts and perplexity windows: documentation that the built-in model was not trained on."""

from __future__ import annotations

import lzma
from importlib import resources


def heldout_text() -> str:
    """Returns 430 KB of plain technical English."""
    packed = resources.files("jax_mla_cp.default_model") / "heldout.txt.xz"
    return lzma.decompress(packed.read_bytes()).decode()
