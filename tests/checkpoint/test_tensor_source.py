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


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935c943f9e0ff69d22\nsize 12345\n"


@pytest.mark.parametrize("name", ["model.safetensors.index.json", "a shard"])
def test_git_lfs_pointers_are_called_that(sharded: Path, name: str) -> None:
    path = sharded / name if name.endswith(".json") else sorted(sharded.glob("*.safetensors"))[1]
    path.write_text(POINTER)
    with pytest.raises(CheckpointError, match=rf"{path.name}: a Git LFS pointer, .* Run `git lfs pull` in {sharded}\."):
        SafetensorsSource(sharded)


def test_a_page_in_place_of_a_shard_is_not_called_truncated(sharded: Path) -> None:
    shard = sorted(sharded.glob("*.safetensors"))[0]
    shard.write_text("<!DOCTYPE html><html>Sign in</html>")
    with pytest.raises(
        CheckpointError, match=rf"{shard.name}: not a safetensors file: it begins with b'<!DOCTYPE html"
    ):
        SafetensorsSource(sharded)


def test_shards_without_their_index(sharded: Path) -> None:
    indexed = SafetensorsSource(sharded)
    (sharded / "model.safetensors.index.json").unlink()
    found = SafetensorsSource(sharded)
    assert found.files == indexed.files and sorted(found.names()) == sorted(indexed.names())
    assert all((found.read(name) == indexed.read(name)).all() for name in indexed.names())


def test_shards_without_their_index_may_be_numbered_in_any_width(sharded: Path) -> None:
    """DeepSeek's are model-00001-of-000163."""
    names = sorted(SafetensorsSource(sharded).names())
    (sharded / "model.safetensors.index.json").unlink()
    for path in sorted(sharded.glob("*.safetensors")):
        path.rename(sharded / path.name.replace("-of-", "-of-0"))
    assert sorted(SafetensorsSource(sharded).names()) == names


def test_what_is_missing_or_ambiguous_without_an_index(sharded: Path) -> None:
    (sharded / "model.safetensors.index.json").unlink()
    shards = sorted(sharded.glob("*.safetensors"))
    second, count = shards[1], len(shards)
    data = second.read_bytes()
    second.unlink()
    with pytest.raises(CheckpointError, match=rf"has {count - 1} of {count} shards, .* that is missing is number 2\."):
        SafetensorsSource(sharded)
    for stray in ("model.safetensors", "model-00002-of-00099.safetensors", f"model-1-of-{count}.safetensors"):
        second.write_bytes(data)
        (sharded / stray).write_bytes(data)
        with pytest.raises(CheckpointError, match=rf"don't tell which belong together: .*{stray}"):
            SafetensorsSource(sharded)
        (sharded / stray).unlink()
    second.write_bytes(shards[0].read_bytes())
    with pytest.raises(CheckpointError, match=rf"{second.name}: has the tensor '.*', as {shards[0].name} has"):
        SafetensorsSource(sharded)


def test_a_file_beside_an_index_that_does_not_list_it(sharded: Path) -> None:
    """transformers would read the file, others the shards."""
    (sharded / "model.safetensors").write_bytes(sorted(sharded.glob("*.safetensors"))[0].read_bytes())
    with pytest.raises(CheckpointError, match="two checkpoints, and which is meant can't be told"):
        SafetensorsSource(sharded)


@pytest.mark.parametrize("name", ["pytorch_model-00001-of-00002.bin", "model.gguf", "consolidated.safetensors"])
def test_weights_of_other_kinds_are_named(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"")
    with pytest.raises(CheckpointError, match=f"There are {name}, which are not read"):
        SafetensorsSource(tmp_path)
