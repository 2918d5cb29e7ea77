"""`quantization_config`: formats that are read, and formats that are refused."""

from __future__ import annotations

from typing import Any

import pytest

from jax_mla_cp.config.errors import ConfigError
from jax_mla_cp.config.model import ModelConfig
from jax_mla_cp.config.quantization import Quantization
from tests.helpers import quantize
from tests.helpers.checkpoints import BASE

RAW: dict[str, Any] = {"model_type": "deepseek_v3", **BASE}


def int4(**weights: Any) -> dict[str, Any]:
    groups = quantize.INT4_CONFIG["config_groups"]
    return {"config_groups": {"group_0": groups["group_0"] | {"weights": groups["group_0"]["weights"] | weights}}}


@pytest.mark.parametrize(
    ("base", "changes", "message"),
    [
        (quantize.FP8_CONFIG, {"quant_method": "awq"}, "quant_method='awq'"),
        (quantize.FP8_CONFIG, {"fmt": "e5m2"}, "fmt='e5m2' .* reads e4m3"),
        (quantize.FP8_CONFIG, {"activation_scheme": "static"}, "activation_scheme='static'"),
        (quantize.FP8_CONFIG, {"weight_block_size": None}, "weight_block_size=None .* per tensor"),
        (quantize.FP8_CONFIG, {"expert_dtype": "fp4"}, "expert_dtype='fp4'"),
        (quantize.INT4_CONFIG, {"format": "nvfp4-pack-quantized"}, "format='nvfp4-pack-quantized'"),
        (quantize.INT4_CONFIG, {"config_groups": {}}, "config_groups={}"),
        (quantize.INT4_CONFIG, {"kv_cache_scheme": {}}, "kv_cache_scheme={}"),
        (quantize.INT4_CONFIG, int4(num_bits=8), r"group_0.weights.num_bits=8 .* reads 4"),
        (quantize.INT4_CONFIG, int4(symmetric=False), "symmetric=False"),
        (quantize.INT4_CONFIG, int4(actorder="group"), "actorder='group'"),
        (quantize.INT4_CONFIG, int4(strategy="channel"), "strategy='channel'"),
        (quantize.INT4_CONFIG, int4(group_size=12), "group_size=12 .* multiple of 8"),
    ],
)
def test_formats_that_cant_be_read(base: dict[str, Any], changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=f"config.json: quantization_config.*{message}"):
        ModelConfig.from_hf(RAW | {"quantization_config": base | changes})


def test_formats_that_can() -> None:
    def read(config: dict[str, Any]) -> Quantization | None:
        return ModelConfig.from_hf(RAW | {"quantization_config": config}).quantization

    assert read(quantize.FP8_CONFIG) == Quantization("fp8", (128, 128))
    newer = {
        "scale_fmt": "ue8m0",
        "modules_to_not_convert": ["lm_head"],
    }  # how scales were rounded is nothing to a reader
    assert read(quantize.FP8_CONFIG | newer) == Quantization("fp8", (128, 128))
    assert read(quantize.INT4_CONFIG) == Quantization("int4", (1, 32))
    with pytest.raises(ConfigError, match="moe_intermediate_size=92 must be multiples of 8"):
        ModelConfig.from_hf(RAW | {"moe_intermediate_size": 92, "quantization_config": quantize.INT4_CONFIG})
