"""The model configurations that ship with the package: `configs/*.json`, in Hugging Face's format.

They give the published models' architecture. Their `quantization_config` is left out: how a checkpoint stores its weights is not
what a preset is for.
"""

from __future__ import annotations

import json
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path

from jax_mla_cp.config.errors import ConfigError
from jax_mla_cp.config.model import ModelConfig


def _folder() -> Traversable:
    # A wheel carries configs/ inside the package; a source tree (an editable install) has it beside the package.
    packaged = resources.files("jax_mla_cp") / "configs"
    return packaged if packaged.is_dir() else Path(__file__).resolve().parents[2] / "configs"


def names() -> list[str]:
    """The presets, in alphabetical order."""
    return sorted(path.name.removesuffix(".json") for path in _folder().iterdir() if path.name.endswith(".json"))


def model_config(name: str) -> ModelConfig:
    """A preset's configuration.

    Raises:
      ConfigError: there is no such preset.
    """
    if name not in names():
        raise ConfigError("name", f"preset {name!r} does not exist; there are {', '.join(names())}.")
    return ModelConfig.from_hf(json.loads((_folder() / f"{name}.json").read_text()))
