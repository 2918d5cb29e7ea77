"""Compares a checkpoint's tensors with those that its config.json describes, before any memory is allocated."""

from __future__ import annotations

import itertools
import logging
import re
from collections.abc import Sequence

import ml_dtypes
import numpy as np

from jax_mla_cp.checkpoint.errors import CheckpointError
from jax_mla_cp.checkpoint.huggingface import expected_shapes, mtp_marker
from jax_mla_cp.checkpoint.parameter import Parameter
from jax_mla_cp.checkpoint.tensor_source import TensorSource
from jax_mla_cp.config.model import ModelConfig
from jax_mla_cp.config.other_formats import format_of_tensors, refused_format
from jax_mla_cp.config.quantization import Tensors

_MAX_LISTED = 20  # tensors listed per kind of mistake
_VISION = ("vision_tower.", "mm_projector.", "multi_modal_projector.")
"""Beside the text part, in KimiK25ForConditionalGeneration and KimiVLForConditionalGeneration."""
_FLOATS = tuple(np.dtype(t) for t in (ml_dtypes.bfloat16, np.float16, np.float32, np.float64))
_log = logging.getLogger(__name__)


def check_tensors(source: TensorSource, config: ModelConfig, parameters: Sequence[Parameter]) -> set[str]:
    """Checks names, shapes and dtypes. Returns the names of the checkpoint's tensors.

    Args:
      parameters: the parameters to be loaded. They decide which matrices may be quantized, and which must be.

    Raises:
      CheckpointError: the tensors are those of a quantized format that this package can't read, which it names. Else it lists
        every tensor that is missing, unexpected, of the wrong shape or of an unsupported dtype, and every layer in which only
        some experts are quantized.
    """
    found = set(source.names())
    if other := format_of_tensors(sorted(found)):
        name, tensor = other
        raise CheckpointError("model", f"the checkpoint has the tensor {tensor}: {refused_format(name)}")
    mtp = any(parameter.path.startswith("mtp.") for parameter in parameters)
    expected: Tensors = {name: (shape, _FLOATS) for name, shape in expected_shapes(config, mtp=mtp).items()}
    incomplete, plain = _expect_quantized(expected, found, config, parameters)
    unused = _unused(found, config) - expected.keys()
    vision = {name for name in found if config.weight_prefix and name.startswith(_VISION)}
    present = sorted(found & expected.keys())
    wrong_shape = [
        f"{name}: expected {list(expected[name][0])}, got {list(source.shape(name))}"
        for name in present
        if tuple(source.shape(name)) != expected[name][0]
    ]
    wrong_dtype = [
        f"{name}: {source.dtype(name)}, not {' or '.join(map(str, expected[name][1]))}"
        for name in present
        if source.dtype(name) not in expected[name][1]
    ]
    mistakes = {
        "missing": sorted(expected.keys() - found),
        "unexpected": sorted(found - expected.keys() - unused - vision),
        "of the wrong shape": wrong_shape,
        "of the wrong dtype (a quantized matrix has scales, any other has none)": wrong_dtype,
        "quantized for only some experts of a layer": incomplete,
        "not quantized, which weights='fp8' asks for (use weights='bf16')": plain,
    }
    if any(mistakes.values()):
        lists = "".join(_listing(mistake, names) for mistake, names in mistakes.items() if names)
        raise CheckpointError(
            "model",
            "the checkpoint's tensors do not match its config.json "
            f"({len(present)} of {len(expected)} expected tensors found):{lists}\n"
            "Check that config.json and the safetensors files belong to the same model and are complete.",
        )
    if unused:
        _log.info("ignored %d tensors that are not needed (multi-token prediction, buffers, tied head)", len(unused))
    if vision:
        _log.info(
            "ignored %d tensors of the image encoder (%s): only text input is supported",
            len(vision),
            ", ".join(f"{part}*" for part in _VISION if any(name.startswith(part) for name in vision)),
        )
    return found


def _expect_quantized(
    expected: Tensors, found: set[str], config: ModelConfig, parameters: Sequence[Parameter]
) -> tuple[list[str], list[str]]:
    """Replaces each matrix that the checkpoint stores quantized by its tensors, in `expected`.

    Returns: matrices that are quantized for only some experts of a layer; and matrices that must be quantized but are not.
    """
    incomplete: list[str] = []
    plain: set[str] = set()  # a set: w_uk and w_uv share a matrix
    for parameter in parameters:
        quantization = parameter.quantization
        if quantization is None or parameter.component == "scale":
            continue
        for mapping, layer in itertools.product(parameter.mappings, parameter.layers or (None,)):
            experts = range(config.n_routed_experts if mapping.routed else 1)
            names = [mapping.name.format(layer=layer, expert=expert) for expert in experts]
            quantized = [name for name in names if quantization.quantizes(name, found)]
            for name in quantized:
                del expected[name]
                expected |= quantization.tensors(name, mapping.stored_shape)
            if 0 < len(quantized) < len(names):
                incomplete.append(mapping.name.format(layer=layer, expert="*"))
            elif parameter.component == "q" and not quantized:
                plain |= set(names)
    return incomplete, sorted(plain)


def _unused(names: set[str], config: ModelConfig) -> set[str]:
    """Tensors that a checkpoint may have and this model does not need.

    MTP layers come after the last one. Only an MTP layer has `eh_proj`, so the extra layers of a wrong config.json stay an
    error.
    """
    layer, prefix = config.num_layers, config.weight_prefix
    while mtp_marker(config, layer) in names:
        layer += 1
    extra = {
        name
        for name in names
        if (match := re.match(re.escape(prefix) + r"model\.layers\.(\d+)\.", name))
        and config.num_layers <= int(match[1]) < layer
    }
    extra |= {name for name in names if name.endswith("rotary_emb.inv_freq")}
    return extra | ({f"{prefix}lm_head.weight"} & names if config.tie_word_embeddings else set())


def _listing(mistake: str, names: list[str]) -> str:
    rest = [f"and {len(names) - _MAX_LISTED} more"] if len(names) > _MAX_LISTED else []
    return f"\n{len(names)} {mistake}:" + "".join(f"\n  {line}" for line in names[:_MAX_LISTED] + rest)
