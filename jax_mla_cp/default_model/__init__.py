"""The built-in model: a Hugging Face directory like any other. README.md beside this is its model card."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

DIRECTORY = Path(str(resources.files(__name__)))
"""config.json, the weights in DeepSeek-V3's FP8 format, tokenizer.json and a chat template."""
