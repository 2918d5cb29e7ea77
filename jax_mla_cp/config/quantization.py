"""The format of a quantized checkpoint's matrices, from config.json's `quantization_config`.

Two kinds. FP8 in blocks: DeepSeek-V3, R1 and Kimi K2 (README_WEIGHTS.md of DeepSeek-V3). 4-bit integers in groups, experts
only: Kimi K2 Thinking and K2.5 (the `pack-quantized` format of the compressed-tensors library). In both, a matrix
[outputs, inputs] is `q * scale`, with one scale for each block of outputs and inputs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Set
from typing import Any, Literal

import ml_dtypes
import numpy as np

from jax_mla_cp.config.other_formats import refused_format, refused_method

Weights = Literal["auto", "bf16", "fp8"]
"""Storage of a quantized checkpoint's matrices in device memory."""

Fp8Compute = Literal["w8a16", "w8a8"]
"""The activations that matrices in FP8 are multiplied by: as they are, or, of many tokens, in FP8 too."""

Tensors = dict[str, tuple[tuple[int, ...], tuple[np.dtype[Any], ...]]]
"""By name: a tensor's shape, and the dtypes that it may have."""

FP8 = np.dtype(ml_dtypes.float8_e4m3fn)


@dataclasses.dataclass(frozen=True)
class Quantization:
    """A quantized checkpoint's format. The tensors that make up the matrix `NAME` are NAME + one of the suffixes."""

    kind: Literal["fp8", "int4"]
    block: tuple[int, int]
    """Outputs and inputs that share a scale. The last block of either may be smaller."""

    @property
    def experts_only(self) -> bool:
        return self.kind == "int4"

    @property
    def multiplies_in_fp8(self) -> bool:
        """True if the checkpoint's own recipe is activations in FP8 too, in blocks that `w8a8` takes.

        That of every FP8 checkpoint that is read: its `activation_scheme` is `dynamic`.
        """
        return self.kind == "fp8" and self.block == (128, 128)

    @property
    def packed(self) -> int:
        """Values in an element of the stored tensor, neighbors along the inputs."""
        return 8 if self.kind == "int4" else 1

    @property
    def stored_suffix(self) -> str:
        return "_packed" if self.kind == "int4" else ""

    @property
    def scale_suffix(self) -> str:
        return "_scale" if self.kind == "int4" else "_scale_inv"

    @property
    def shape_suffix(self) -> str:
        """Suffix of the tensor with [outputs, inputs] before packing; "" if there is none."""
        return "_shape" if self.kind == "int4" else ""

    @property
    def stored_dtype(self) -> np.dtype[Any]:
        return np.dtype(np.int32) if self.kind == "int4" else FP8

    @property
    def scale_dtype(self) -> np.dtype[Any]:
        return np.dtype(ml_dtypes.bfloat16) if self.kind == "int4" else np.dtype(np.float32)

    def scales(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of the scales of a matrix of [outputs, inputs].

        >>> Quantization("fp8", (128, 128)).scales((576, 7168))
        (5, 56)
        """
        return tuple(-(-size // block) for size, block in zip(shape, self.block, strict=True))

    def tensors(self, name: str, shape: tuple[int, ...]) -> Tensors:
        """The tensors that store the matrix `name` of [outputs, inputs]."""
        outputs, inputs = shape
        made_of: Tensors = {
            name + self.stored_suffix: ((outputs, inputs // self.packed), (self.stored_dtype,)),
            name + self.scale_suffix: (self.scales(shape), (self.scale_dtype,)),
        }
        if self.shape_suffix:
            made_of[name + self.shape_suffix] = ((2,), (np.dtype(np.int32), np.dtype(np.int64)))
        return made_of

    def quantizes(self, name: str, names: Set[str]) -> bool:
        """True if a checkpoint with the tensors `names` has the matrix `name` quantized."""
        suffixes = (self.stored_suffix, self.scale_suffix, self.shape_suffix)
        return any(suffix and name + suffix in names for suffix in suffixes)

    @classmethod
    def from_hf(cls, raw: Mapping[str, Any] | None) -> Quantization | None:
        """Reads config.json's `quantization_config`; None if there is none.

        Which matrices are quantized is told by the checkpoint's tensors, so the lists of those that are not
        (`modules_to_not_convert`, `ignore`) are not read.

        Raises:
          ValueError: any other format; the message begins with the key.
        """
        if raw is None:
            return None
        if not isinstance(raw, Mapping):
            raise ValueError(f"quantization_config must be an object, got {raw!r}.")
        method = raw.get("quant_method")
        if method == "fp8":
            return cls("fp8", _fp8_block(raw))
        if method == "compressed-tensors":
            return cls("int4", (1, _int4_group(raw)))
        if reason := refused_method(raw):
            raise ValueError(f"quantization_config{reason}")
        raise ValueError(_refused("quant_method", method, "fp8 (in blocks) or compressed-tensors (4-bit, in groups)"))


def _fp8_block(raw: Mapping[str, Any]) -> tuple[int, int]:
    only = {"fmt": ("e4m3",), "activation_scheme": ("dynamic",), "expert_dtype": ("fp8",)}
    for key, allowed in only.items():
        if raw.get(key, allowed[0]) not in allowed:
            raise ValueError(_refused(key, raw[key], " or ".join(allowed)))
    block = raw.get("weight_block_size")
    if not isinstance(block, list | tuple) or len(block) != 2 or not all(isinstance(b, int) and b > 0 for b in block):
        raise ValueError(
            _refused("weight_block_size", block, "two whole numbers, as [128, 128] (null is one scale per tensor)")
        )
    return block[0], block[1]


def _int4_group(raw: Mapping[str, Any]) -> int:
    if raw.get("format") == "nvfp4-pack-quantized":
        raise ValueError(f"quantization_config.format='nvfp4-pack-quantized': {refused_format('NVFP4')}")
    if raw.get("format") != "pack-quantized":
        raise ValueError(_refused("format", raw.get("format"), "pack-quantized"))
    if raw.get("kv_cache_scheme") is not None:
        raise ValueError(_refused("kv_cache_scheme", raw["kv_cache_scheme"], "null"))
    groups = raw.get("config_groups")
    if not isinstance(groups, Mapping) or len(groups) != 1 or not all(isinstance(g, Mapping) for g in groups.values()):
        raise ValueError(_refused("config_groups", groups, "a single group"))
    ((name, group),) = groups.items()
    if group.get("input_activations") is not None:
        raise ValueError(_refused(f"config_groups.{name}.input_activations", group["input_activations"], "null"))
    weights = group.get("weights")
    if not isinstance(weights, Mapping):
        raise ValueError(_refused(f"config_groups.{name}.weights", weights, "4-bit integers in groups"))
    for key, wanted in (
        ("num_bits", 4),
        ("type", "int"),
        ("strategy", "group"),
        ("symmetric", True),
        ("actorder", None),
    ):
        if weights.get(key) != wanted:
            raise ValueError(_refused(f"config_groups.{name}.weights.{key}", weights.get(key), repr(wanted)))
    size = weights.get("group_size")
    if not isinstance(size, int) or size < 8 or size % 8:
        raise ValueError(_refused(f"config_groups.{name}.weights.group_size", size, "a multiple of 8"))
    return size


def _refused(key: str, got: object, can: str) -> str:
    return f"quantization_config.{key}={got!r} is not supported; this version reads {can}."
