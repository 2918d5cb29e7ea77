"""Tensors that do not match config.json: one error that lists everything that is wrong."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from flax import nnx
from numpy.typing import NDArray

from jax_mla_cp.checkpoint import CheckpointError, expected_shapes, load_params
from jax_mla_cp.config.model import ModelConfig
from jax_mla_cp.model.build import Build
from jax_mla_cp.model.decoder import Decoder
from tests.helpers import hf_tensors as hf
from tests.helpers.array_source import ArraySource

CONFIG = ModelConfig.from_hf({"model_type": "deepseek_v3", **hf.TINY})


def arrays(config: ModelConfig = CONFIG) -> dict[str, NDArray[Any]]:
    return {name: np.ones(shape, np.float32) for name, shape in expected_shapes(config).items()}


def load(tensors: dict[str, NDArray[Any]], config: ModelConfig = CONFIG) -> nnx.State:
    return load_params(ArraySource(tensors), nnx.state(Decoder(Build(config))), config, None)


def test_all_mistakes_in_one_error() -> None:
    tensors = arrays()
    del tensors["model.norm.weight"]
    del tensors["model.layers.2.mlp.experts.7.up_proj.weight"]
    tensors["model.layers.0.self_attn.q_proj.bias"] = np.zeros(3)
    tensors["model.embed_tokens.weight"] = np.zeros((98, 31), np.float32)
    tensors["lm_head.weight"] = np.zeros((98, 32), np.int8)
    with pytest.raises(CheckpointError) as caught:
        load(tensors)
    message = str(caught.value)
    assert "2 missing:\n  model.layers.2.mlp.experts.7.up_proj.weight\n  model.norm.weight" in message
    assert "1 unexpected:\n  model.layers.0.self_attn.q_proj.bias" in message
    assert "1 of the wrong shape:\n  model.embed_tokens.weight: expected [98, 32], got [98, 31]" in message
    assert "lm_head.weight: int8" in message


def test_long_lists_are_capped() -> None:
    with pytest.raises(CheckpointError, match=r"and \d+ more") as caught:
        load({"something.else": np.zeros(1)})
    assert len(str(caught.value).splitlines()) < 30


def test_extra_layers_are_an_error_and_mtp_layers_are_not(caplog: pytest.LogCaptureFixture) -> None:
    tensors = arrays()
    tensors["model.layers.3.input_layernorm.weight"] = np.ones(32, np.float32)
    with pytest.raises(CheckpointError, match="1 unexpected"):
        load(tensors)
    tensors["model.layers.3.eh_proj.weight"] = np.ones((32, 64), np.float32)
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(4, np.float32)
    with caplog.at_level("INFO"):
        load(tensors)
    assert sum("ignored 3 tensors" in record.message for record in caplog.records) == 1


def test_vision_tensors_of_a_multimodal_checkpoint_are_skipped(caplog: pytest.LogCaptureFixture) -> None:
    """Kimi K2.5's, by their published names, and only where the text part is one of several."""
    wrapped = ModelConfig.from_hf({"model_type": "kimi_k25", "text_config": {"model_type": "kimi_k2", **hf.TINY}})
    tensors = arrays(wrapped)
    assert all(name.startswith(("language_model.model.", "language_model.lm_head.")) for name in tensors)
    vision = (
        "vision_tower.encoder.blocks.0.wqkv.bias",
        "vision_tower.patch_embed.proj.weight",
        "mm_projector.proj.0.bias",
    )
    images = {name: np.ones(3, np.float32) for name in vision}
    with caplog.at_level("INFO"):
        load(tensors | images, wrapped)
    assert "ignored 3 tensors of the image encoder (vision_tower.*, mm_projector.*)" in caplog.text
    for name in ("audio_tower.x", "model.norm.weight"):
        with pytest.raises(CheckpointError, match=f"1 unexpected:\n  {name}"):
            load(tensors | images | {name: np.ones(3, np.float32)}, wrapped)
    with pytest.raises(CheckpointError, match="3 unexpected:\n  mm_projector"):
        load(arrays() | images)
    del tensors["language_model.lm_head.weight"]
    with pytest.raises(CheckpointError, match=r"1 missing:\n  language_model.lm_head.weight"):
        load(tensors, wrapped)


def test_a_softmax_router_has_no_bias() -> None:
    routing = {"model_type": "deepseek_v2", "norm_topk_prob": False, "topk_method": "group_limited_greedy"}
    config = ModelConfig.from_hf(hf.TINY | routing)
    tensors = arrays(config)
    assert not any(name.endswith("e_score_correction_bias") for name in tensors)
    load(tensors, config)
    with pytest.raises(CheckpointError, match=r"2 unexpected:\n  model.layers.1.mlp.gate.e_score_correction_bias"):
        load(arrays(), config)


def test_an_mtp_layer_that_is_asked_for_must_be_whole() -> None:
    config = ModelConfig.from_hf({"model_type": "deepseek_v3", **hf.TINY, "num_nextn_predict_layers": 1})
    asked = nnx.state(Decoder(Build(config, mtp=True)))
    tensors = {name: np.ones(shape, np.float32) for name, shape in expected_shapes(config, mtp=True).items()}
    load_params(ArraySource(tensors), asked, config, None)
    del tensors["model.layers.3.eh_proj.weight"]
    tensors["model.layers.3.hnorm.weight"] = np.ones(31, np.float32)
    with pytest.raises(CheckpointError) as caught:
        load_params(ArraySource(tensors), asked, config, None)
    assert "1 missing:\n  model.layers.3.eh_proj.weight" in str(caught.value)
    assert "model.layers.3.hnorm.weight: expected [32], got [31]" in str(caught.value)


def test_tied_head_may_be_there() -> None:
    config = ModelConfig.from_hf({"model_type": "deepseek_v3", **hf.TINY, "tie_word_embeddings": True})
    tensors = arrays(config)
    assert "lm_head.weight" not in tensors
    load(tensors, config)
    load(tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"]}, config)


@pytest.mark.parametrize(
    ("suffixes", "name"),
    [
        (["weight_scale", "weight_scale_2", "input_scale"], "NVFP4"),
        (["weight_packed", "weight_scale", "weight_global_scale"], "NVFP4"),
        (["qweight", "qzeros", "scales", "g_idx"], "GPTQ"),
        (["qweight", "qzeros", "scales"], "AWQ"),
        (["weight", "weight.absmax", "weight.quant_state.bitsandbytes__nf4"], "bitsandbytes"),
    ],
)
def test_formats_of_other_programs_are_told_by_their_tensors(suffixes: list[str], name: str) -> None:
    """config.json of such a checkpoint may say nothing of it."""
    matrix = "model.layers.1.mlp.experts.0.down_proj."
    quantized = {matrix + suffix: np.zeros((4, 4), np.uint8) for suffix in suffixes}
    with pytest.raises(
        CheckpointError, match=f"the checkpoint has the tensor {matrix}.*: {name} is not supported.* Use"
    ):
        load(arrays() | quantized)


def test_image_tensors_of_kimi_vl_are_skipped() -> None:
    wrapped = ModelConfig.from_hf({"model_type": "kimi_vl", "text_config": {"model_type": "deepseek_v3", **hf.TINY}})
    names = ("vision_tower.patch_embed.proj.weight", "multi_modal_projector.linear_1.weight")
    load(arrays(wrapped) | {name: np.ones(3, np.float32) for name in names}, wrapped)
