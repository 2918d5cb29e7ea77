"""Compares a checkpoint with what its config.json describes, before any memory is allocated."""

from __future__ import annotations

import logging
import re

import ml_dtypes
import numpy as np

from jax_mla_cp.checkpoint.huggingface import expected_shapes
from jax_mla_cp.checkpoint.source import CheckpointError, TensorSource
from jax_mla_cp.config import ModelConfig

_SHOWN = 20  # tensors listed per kind of mistake
_FLOATS = tuple(np.dtype(t) for t in (ml_dtypes.bfloat16, np.float16, np.float32, np.float64))
_log = logging.getLogger(__name__)


def check_tensors(source: TensorSource, config: ModelConfig, *, mtp: bool = False) -> None:
    """Names, shapes and dtypes; `mtp`: those of the layer for multi-token prediction too.

    Raises:
      CheckpointError: lists all tensors that are missing, surplus, of the wrong shape or of a dtype that can't be read.
    """
    expected = expected_shapes(config, mtp=mtp)
    found = set(source.names())
    ignored = _ignored(found, config) - expected.keys()
    present = sorted(found & expected.keys())
    wrong = [
        f"{name}: expected {list(expected[name])}, got {list(source.shape(name))}"
        for name in present
        if tuple(source.shape(name)) != expected[name]
    ]
    unreadable = [f"{name}: {source.dtype(name)}" for name in present if source.dtype(name) not in _FLOATS]
    mistakes = {
        "missing": sorted(expected.keys() - found),
        "surplus": sorted(found - expected.keys() - ignored),
        "of the wrong shape": wrong,
        "not in bfloat16, float16, float32 or float64": unreadable,
    }
    if any(mistakes.values()):
        lists = "".join(_listing(what, names) for what, names in mistakes.items() if names)
        raise CheckpointError(
            f"the checkpoint's tensors are not those that its config.json describes "
            f"({len(expected)} expected, {len(present)} of them found):{lists}\n"
            "Check that config.json and the safetensors files belong to the same model and are complete."
        )
    if ignored:
        _log.info(
            "ignored %d tensors that inference does not use (multi-token prediction, buffers, tied head)", len(ignored)
        )


def _ignored(names: set[str], config: ModelConfig) -> set[str]:
    """Tensors that may be there and need not be used.

    Multi-token prediction adds layers after the last one; only such a layer has `eh_proj`, so that the surplus layers
    of a wrong config.json stay an error.
    """
    layer = config.num_layers
    while f"model.layers.{layer}.eh_proj.weight" in names:
        layer += 1
    extra = {
        name
        for name in names
        if (match := re.match(r"model\.layers\.(\d+)\.", name)) and config.num_layers <= int(match[1]) < layer
    }
    extra |= {name for name in names if name.endswith("rotary_emb.inv_freq")}
    return extra | ({"lm_head.weight"} & names if config.tie_word_embeddings else set())


def _listing(what: str, names: list[str]) -> str:
    rest = [f"and {len(names) - _SHOWN} more"] if len(names) > _SHOWN else []
    return f"\n{len(names)} {what}:" + "".join(f"\n  {line}" for line in names[:_SHOWN] + rest)
