"""safetensors files that are missing, truncated or damaged."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from jax_mla_cp.checkpoint import CheckpointError, SafetensorsSource
from tests.helpers import hf_tensors as hf


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    return hf.write(tmp_path)


def test_truncated_file(sharded: Path) -> None:
    shard = sorted(sharded.glob("*.safetensors"))[1]
    data = shard.read_bytes()
    for size in (len(data) - 1, len(data) // 2, 100, 5, 0):
        shard.write_bytes(data[:size])
        with pytest.raises(CheckpointError, match=rf"{shard.name}: truncated"):
            SafetensorsSource(sharded)


def test_damaged_header(sharded: Path) -> None:
    shard = sorted(sharded.glob("*.safetensors"))[0]
    data = bytearray(shard.read_bytes())
    data[8:12] = b"\xff\xff\xff\xff"
    shard.write_bytes(data)
    with pytest.raises(CheckpointError, match="not a safetensors header"):
        SafetensorsSource(sharded)


def test_missing_shard(sharded: Path) -> None:
    shard = sorted(sharded.glob("*.safetensors"))[2]
    shard.unlink()
    with pytest.raises(CheckpointError, match=rf"1 of \d+ files .* missing: {shard.name}"):
        SafetensorsSource(sharded)


def test_index_that_lies(sharded: Path) -> None:
    index = sharded / "model.safetensors.index.json"
    raw = json.loads(index.read_text())
    raw["weight_map"]["lm_head.bias"] = next(iter(raw["weight_map"].values()))
    index.write_text(json.dumps(raw))
    with pytest.raises(CheckpointError, match=r"has no tensor 'lm_head.bias'"):
        SafetensorsSource(sharded)
    raw["weight_map"] = {"a": "../outside.safetensors"}
    index.write_text(json.dumps(raw))
    with pytest.raises(CheckpointError, match="missing"):
        SafetensorsSource(sharded)
    index.write_text("[]")
    with pytest.raises(CheckpointError, match="weight_map"):
        SafetensorsSource(sharded)


def test_directory_without_weights(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="safetensors"):
        SafetensorsSource(tmp_path)
