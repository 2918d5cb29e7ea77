"""Parity with transformers' GLM-4.7-Flash, whose config.json has keys of its own, in float32 on a small random checkpoint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import Glm4MoeLiteConfig, Glm4MoeLiteForCausalLM

import jax_mla_cp as mla
from tests.helpers.checkpoints import BASE
from tests.helpers.synthetic import Driver

TOKENS = np.random.default_rng(0).integers(0, BASE["vocab_size"], 60).tolist()


@pytest.fixture(scope="module")
def glm(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, np.ndarray]:
    """A checkpoint, and the logits of the last of `TOKENS`."""
    # v is as wide as q and k, rope is plain, the first layer is dense: as published.
    changes: dict[str, Any] = {
        "n_group": 1,
        "topk_group": 1,
        "routed_scaling_factor": 1.8,
        "v_head_dim": 24,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "partial_rotary_factor": 1.0},
    }
    dropped = ("first_k_dense_replace", "num_nextn_predict_layers")
    config = Glm4MoeLiteConfig(**{key: value for key, value in (BASE | changes).items() if key not in dropped})
    torch.manual_seed(0)
    model = Glm4MoeLiteForCausalLM(config).eval()
    with torch.no_grad():
        for name, value in (*model.named_parameters(), *model.named_buffers()):
            if name.endswith("correction_bias"):
                value.uniform_(-0.7, 0.1)
            elif value.ndim == 1 and name.endswith("weight"):
                value.normal_(1.0, 0.2)
            elif value.ndim > 1:
                value.normal_(0.0, value.shape[-1] ** -0.5)
        logits = model(torch.tensor([TOKENS]), use_cache=False).logits[0, -1].numpy()
    path = tmp_path_factory.mktemp("glm")
    model.save_pretrained(path)
    return path, logits


def difference(path: Path, want: np.ndarray, mesh: str | None) -> float:
    model, _ = mla.load(path, mesh=mla.make_mesh(mesh) if mesh else None, dtype="float32", progress=False)
    driver = Driver(model)
    got = driver.step([(driver.request(0), TOKENS)])[0]
    return float(np.abs(got - want).max() / np.abs(want).max())


@pytest.mark.parametrize("mesh", [None, "tp=2,cp=2"])
def test_same_logits(glm: tuple[Path, np.ndarray], mesh: str | None) -> None:
    path, want = glm
    assert json.loads((path / "config.json").read_text())["mlp_layer_types"] == ["dense", "sparse", "sparse"]
    assert difference(path, want, mesh) < 1e-4


def test_other_numbers_are_noticed(glm: tuple[Path, np.ndarray], tmp_path: Path) -> None:
    """Negative control."""
    path, want = glm
    raw = json.loads((path / "config.json").read_text())
    raw["rope_parameters"]["rope_theta"] = 1e4
    (tmp_path / "config.json").write_text(json.dumps(raw))
    (tmp_path / "model.safetensors").symlink_to(path / "model.safetensors")
    assert difference(tmp_path, want, None) > 1e-3
