"""The format of a converted checkpoint: chunks, and damage that is found and named."""

from __future__ import annotations

import json
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

import jax_mla_cp as mla
from jax_mla_cp.checkpoint import CheckpointError, open_converted
from jax_mla_cp.checkpoint.orbax import StoredArray
from tests.helpers.converted import cut, flip, grow


def test_float8_is_just_another_dtype(tmp_path: Path) -> None:
    array = StoredArray.chunked("a.b", (3, 5, 64), np.dtype(ml_dtypes.float8_e4m3fn), 1, 2)
    values = np.random.default_rng(0).normal(size=array.shape).astype(array.dtype)
    array.open(tmp_path, create=True).write(values).result()
    got = array.open(tmp_path).read().result()
    assert got.dtype == array.dtype
    np.testing.assert_array_equal(got.view(np.uint8), values.view(np.uint8))


@pytest.mark.parametrize(
    ("shape", "stacked_dims", "sharded_dim", "chunk_shape"),
    [
        ((58, 256, 2, 2048, 7168), 2, None, (1, 1, 2, 2048, 7168)),  # an expert
        ((58, 128 * 192, 1536), 1, 1, (1, 384, 1536)),  # two heads: 64 splits of at least 1 MiB
        ((58, 7168, 128 * 128), 1, 2, (1, 7168, 256)),
        ((58, 128, 128, 512), 1, 1, (1, 8, 128, 512)),
        ((129280, 7168), 0, 0, (2020, 7168)),
        ((163840 + 1, 8), 0, 0, (81921, 8)),  # no power of two divides it
        ((58, 7168), 1, None, (1, 7168)),
    ],
)
def test_chunks_are_cut_where_meshes_cut(
    shape: tuple[int, ...], stacked_dims: int, sharded_dim: int | None, chunk_shape: tuple[int, ...]
) -> None:
    assert (
        StoredArray.chunked("a", shape, np.dtype(ml_dtypes.bfloat16), stacked_dims, sharded_dim).chunk_shape
        == chunk_shape
    )


FILES = [
    "config.json",
    "generation_config.json",
    "chat_template.jinja",
    "jax_mla_cp.json",
    "weights/_CHECKPOINT_METADATA",
    "weights/commit_success.txt",
    "weights/state/_METADATA",
    "weights/state/moe.mlp.down/zarr.json",
    "weights/state/moe.mlp.down/c/1/11/0/0",
    "weights/state/final_norm/c/0",
    "weights/orbax.checkpoint",
]


def test_damage_is_found_and_named(out: Path) -> None:
    kinds = {path.name for path in out.rglob("*") if path.is_file() and "c" not in path.parent.parts[len(out.parts) :]}
    assert kinds == {Path(name).name for name in FILES if "/c/" not in name} | {"LICENSE"}, "every kind of file is here"
    for name in FILES:
        path = out / name
        whole = path.read_bytes()
        for harm in (Path.unlink, cut, flip, grow) if whole else (Path.unlink, grow):
            harm(path)
            with pytest.raises(CheckpointError) as caught:
                mla.load(out, progress=False)
            assert str(path) in str(caught.value), (name, harm, str(caught.value))
            path.write_bytes(whole)
    mla.load(out, progress=False)


def test_all_damaged_files_in_one_error(out: Path) -> None:
    for name in ("weights/state/moe.mlp.down/c/0/3/0/0", "config.json"):
        (out / name).unlink()
    cut(out / "weights/state/embed/c/0/0")
    with pytest.raises(CheckpointError, match="3 damaged files") as caught:
        open_converted(out)
    assert "moe.mlp.down/c/0/3/0/0: missing" in str(caught.value) and "embed/c/0/0: expected" in str(caught.value)


@pytest.mark.parametrize("layout", [1, 3], ids=["matrices lay [inputs, outputs]", "newer"])
def test_other_layouts(out: Path, layout: int) -> None:
    path = out / "jax_mla_cp.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"layout": layout}))
    with pytest.raises(
        CheckpointError,
        match=rf"{path}: layout {layout}; this version of jax_mla_cp reads layout 2. .*Convert again: .* --overwrite",
    ):
        mla.load(out)
