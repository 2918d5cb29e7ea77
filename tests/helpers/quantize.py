"""Quantized checkpoints out of plain ones, and plain ones out of them: NumPy, with none of the package's code
but the list of a model's tensors."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

from jax_mla_cp.checkpoint import expected_shapes
from jax_mla_cp.config.model import ModelConfig

FP8_CONFIG: dict[str, Any] = {
    "quant_method": "fp8",
    "fmt": "e4m3",
    "activation_scheme": "dynamic",
    "weight_block_size": [128, 128],
}
INT4_CONFIG: dict[str, Any] = {
    "quant_method": "compressed-tensors",
    "format": "pack-quantized",
    "quantization_status": "compressed",
    "kv_cache_scheme": None,
    "ignore": ["lm_head", "re:.*self_attn.*", "re:.*shared_experts.*"],
    "config_groups": {
        "group_0": {
            "input_activations": None,
            "output_activations": None,
            "targets": ["Linear"],
            "weights": {
                "actorder": None,
                "block_structure": None,
                "dynamic": False,
                "group_size": 32,
                "num_bits": 4,
                "observer": "minmax",
                "observer_kwargs": {},
                "strategy": "group",
                "symmetric": True,
                "type": "int",
            },
        }
    },
}

RAGGED_SIZES: dict[str, Any] = {
    "vocab_size": 300,
    "hidden_size": 160,
    "intermediate_size": 280,
    "moe_intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "q_lora_rank": 136,
    "kv_lora_rank": 120,
    "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 40,
    "v_head_dim": 32,
}
"""Nothing is a multiple of 128. Heads of 56 query rows and 72 rows of keys and values straddle blocks, and so do the 16 roped
rows behind 120 latents."""
ALIGNED_SIZES = RAGGED_SIZES | {
    "hidden_size": 256,
    "intermediate_size": 512,
    "moe_intermediate_size": 256,
    "q_lora_rank": 128,
    "kv_lora_rank": 128,
    "qk_nope_head_dim": 112,
    "v_head_dim": 128,
}
"""Heads of 128, whose roped rows end a block: all stay in FP8 at tp=2; tp=4 cuts what is 256 wide."""

_LINEAR = re.compile(r"model\.layers\.\d+\.(self_attn|mlp).*_proj(_with_mqa)?\.weight$")
_EXPERT = re.compile(r"model\.layers\.\d+\.mlp\.experts\.\d+\..*_proj\.weight$")

Tensors = dict[str, np.ndarray]


def random_tensors(config: ModelConfig) -> Tensors:
    """A plain checkpoint: matrices that keep the variance of what they multiply, norms near 1."""
    rng = np.random.default_rng(0)
    out = {}
    for name, shape in expected_shapes(config).items():
        mean, spread = (1.0, 0.1) if "norm" in name else (0.0, shape[-1] ** -0.5)
        out[name] = rng.normal(mean, spread, shape).astype(np.float32)
    return out


def to_fp8(tensors: Tensors) -> Tensors:
    """As DeepSeek-V3's: every linear layer but router and head in blocks of 128 x 128, the last ones smaller."""
    out = dict(tensors)
    for name in filter(_LINEAR.search, tensors):
        weight = tensors[name].astype(np.float32)
        scale = np.zeros([-(-n // 128) for n in weight.shape], np.float32)
        stored = np.zeros(weight.shape, ml_dtypes.float8_e4m3fn)
        for i, j in np.ndindex(*scale.shape):
            block = np.s_[128 * i : 128 * (i + 1), 128 * j : 128 * (j + 1)]
            scale[i, j] = np.abs(weight[block]).max() / 448
            stored[block] = (weight[block] / scale[i, j]).astype(ml_dtypes.float8_e4m3fn)
        out |= {name: stored, f"{name}_scale_inv": scale}
    return out


def from_fp8(tensors: Tensors) -> Tensors:
    """The matrices, in float32, with neither `_scale_inv` nor float8."""
    out = {}
    for name, value in tensors.items():
        if (scale := tensors.get(f"{name}_scale_inv")) is not None:
            rows, columns = np.arange(value.shape[0]) // 128, np.arange(value.shape[1]) // 128
            value = value.astype(np.float32) * scale[rows[:, None], columns[None]]
        if not name.endswith("_scale_inv"):
            out[name] = value
    return out


def to_int4(tensors: Tensors) -> Tensors:
    """As Kimi K2 Thinking's: experts in groups of 32 inputs, eight numbers in an int32, the first in its lowest bits."""
    out = dict(tensors)
    for name in filter(_EXPERT.search, tensors):
        weight = out.pop(name).astype(np.float32)
        outputs, inputs = weight.shape
        groups = weight.reshape(outputs, inputs // 32, 32)
        scale = (np.abs(groups).max(-1, keepdims=True) / 7.5).astype(ml_dtypes.bfloat16)
        values = np.clip(np.round(groups / scale.astype(np.float32)), -8, 7).astype(np.int64).reshape(outputs, -1, 8)
        packed = sum((values[..., i] + 8) << (4 * i) for i in range(8))
        out |= {
            f"{name}_packed": packed.astype(np.uint32).view(np.int32),
            f"{name}_scale": scale[..., 0],
            f"{name}_shape": np.array([outputs, inputs], np.int64),
        }
    return out


def from_int4(tensors: Tensors) -> Tensors:
    """The experts' matrices, in float32, without packing."""
    out = {name: value for name, value in tensors.items() if not re.search("weight_(packed|scale|shape)$", name)}
    for name, packed in tensors.items():
        if name.endswith("_packed"):
            base = name.removesuffix("_packed")
            words = packed.view(np.uint32)
            values = (
                np.stack([words >> np.uint32(4 * i) & np.uint32(15) for i in range(8)], axis=-1).astype(np.float32) - 8
            )
            scale = np.repeat(tensors[f"{base}_scale"].astype(np.float32), 32, axis=1)
            out[base] = values.reshape(scale.shape) * scale
    return out


def write(directory: Path, like: Path, tensors: Tensors, quantization: dict[str, Any] | None) -> Path:
    """A checkpoint with the config of `like` and these tensors."""
    directory.mkdir(exist_ok=True)
    raw = json.loads((like / "config.json").read_text())
    raw |= {} if quantization is None else {"quantization_config": quantization}
    (directory / "config.json").write_text(json.dumps(raw))
    (directory / "tokenizer.json").write_text((like / "tokenizer.json").read_text())
    save_file({name: np.ascontiguousarray(value) for name, value in tensors.items()}, directory / "model.safetensors")
    return directory
