"""Compares a checkpoint with what its config.json describes, before any memory is allocated."""

from __future__ import annotations

import itertools
import logging
import re
from collections.abc import Sequence

import ml_dtypes
import numpy as np

from jax_mla_cp.checkpoint.huggingface import expected_shapes
from jax_mla_cp.checkpoint.source import CheckpointError, TensorSource
from jax_mla_cp.checkpoint.target import Target
from jax_mla_cp.config.model import ModelConfig
from jax_mla_cp.config.quantization import Tensors

_SHOWN = 20  # tensors listed per kind of mistake
_VISION = ("vision_tower.", "mm_projector.")  # beside the text part, in KimiK25ForConditionalGeneration
_FLOATS = tuple(np.dtype(t) for t in (ml_dtypes.bfloat16, np.float16, np.float32, np.float64))
_log = logging.getLogger(__name__)


def check_tensors(source: TensorSource, config: ModelConfig, targets: Sequence[Target]) -> set[str]:
    """Names, shapes and dtypes. Returns the names that the checkpoint has.

    Args:
      targets: the parameters, which say what may be quantized, and what must be because it stays so.

    Raises:
      CheckpointError: lists all tensors that are missing, surplus, of the wrong shape or of a dtype that can't be read, and
        what is quantized only in part.
    """
    found = set(source.names())
    mtp = any(target.path.startswith("mtp.") for target in targets)
    expected: Tensors = {name: (shape, _FLOATS) for name, shape in expected_shapes(config, mtp=mtp).items()}
    incomplete, plain = _expect_quantized(expected, found, config, targets)
    ignored = _ignored(found, config) - expected.keys()
    vision = {name for name in found if config.weight_prefix and name.startswith(_VISION)}
    present = sorted(found & expected.keys())
    wrong = [
        f"{name}: expected {list(expected[name][0])}, got {list(source.shape(name))}"
        for name in present
        if tuple(source.shape(name)) != expected[name][0]
    ]
    unreadable = [
        f"{name}: {source.dtype(name)}, not {' or '.join(map(str, expected[name][1]))}"
        for name in present
        if source.dtype(name) not in expected[name][1]
    ]
    mistakes = {
        "missing": sorted(expected.keys() - found),
        "surplus": sorted(found - expected.keys() - ignored - vision),
        "of the wrong shape": wrong,
        "of a dtype that does not belong there (one that is quantized has scales, others have none)": unreadable,
        "quantized for some experts of a layer only": incomplete,
        "not quantized, which weights='fp8' asks for (use weights='bf16')": plain,
    }
    if any(mistakes.values()):
        lists = "".join(_listing(what, names) for what, names in mistakes.items() if names)
        raise CheckpointError(
            "model",
            f"the checkpoint's tensors are not those that its config.json describes "
            f"({len(expected)} expected, {len(present)} of them found):{lists}\n"
            "Check that config.json and the safetensors files belong to the same model and are complete.",
        )
    if ignored:
        _log.info(
            "ignored %d tensors that inference does not use (multi-token prediction, buffers, tied head)", len(ignored)
        )
    if vision:
        _log.info(
            "ignored %d tensors of the image encoder (%s): only text runs",
            len(vision),
            ", ".join(f"{part}*" for part in _VISION if any(name.startswith(part) for name in vision)),
        )
    return found


def _expect_quantized(
    expected: Tensors, found: set[str], config: ModelConfig, targets: Sequence[Target]
) -> tuple[list[str], list[str]]:
    """Puts the tensors of the matrices that the checkpoint has quantized in the place of their one.

    Returns: matrices that only some experts of a layer have quantized; and those that should be quantized and are not.
    """
    incomplete: list[str] = []
    plain: set[str] = set()  # w_uk and w_uv are made of one matrix
    for target in targets:
        quantization = target.quantization
        if quantization is None or target.holds == "scale":
            continue
        for piece, layer in itertools.product(target.pieces, target.layers or (None,)):
            experts = range(config.n_routed_experts if piece.routed else 1)
            names = [piece.name.format(layer=layer, expert=expert) for expert in experts]
            quantized = [name for name in names if quantization.quantizes(name, found)]
            for name in quantized:
                del expected[name]
                expected |= quantization.tensors(name, piece.stored)
            if 0 < len(quantized) < len(names):
                incomplete.append(piece.name.format(layer=layer, expert="*"))
            elif target.holds == "q" and not quantized:
                plain |= set(names)
    return incomplete, sorted(plain)


def _ignored(names: set[str], config: ModelConfig) -> set[str]:
    """Tensors that may be there and need not be used.

    Multi-token prediction adds layers after the last one; only such a layer has `eh_proj`, so that the surplus layers
    of a wrong config.json stay an error.
    """
    layer, prefix = config.num_layers, config.weight_prefix
    while f"{prefix}model.layers.{layer}.eh_proj.weight" in names:
        layer += 1
    extra = {
        name
        for name in names
        if (match := re.match(re.escape(prefix) + r"model\.layers\.(\d+)\.", name))
        and config.num_layers <= int(match[1]) < layer
    }
    extra |= {name for name in names if name.endswith("rotary_emb.inv_freq")}
    return extra | ({f"{prefix}lm_head.weight"} & names if config.tie_word_embeddings else set())


def _listing(what: str, names: list[str]) -> str:
    rest = [f"and {len(names) - _SHOWN} more"] if len(names) > _SHOWN else []
    return f"\n{len(names)} {what}:" + "".join(f"\n  {line}" for line in names[:_SHOWN] + rest)
