"""A checkpoint that transformers wrote, against an independent transformation of its tensors."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from jax.sharding import NamedSharding

from jax_mla_cp.checkpoint import SafetensorsSource, TensorSource, load_params
from jax_mla_cp.config.model import ModelConfig
from jax_mla_cp.mesh import make_mesh, mesh_shape
from jax_mla_cp.model.build import Build
from jax_mla_cp.model.decoder import Decoder
from tests.helpers import hf_tensors as hf
from tests.helpers.array_source import ArraySource


def load(
    source: TensorSource,
    config: ModelConfig,
    mesh: str | None,
    ep: tuple[str, ...] = ("tp",),
    dtype: Any = jnp.float32,
    mtp: bool = False,
) -> tuple[Build, dict[str, jax.Array]]:
    on = make_mesh(mesh) if mesh else None
    build = Build(config, mesh_shape(on) if on else None, ep, jnp.dtype(dtype), mtp=mtp)
    state = load_params(source, nnx.state(Decoder(build)), config, on)
    for path, param in nnx.to_flat_state(state):
        if on:
            spec = param.get_metadata("spec")
            assert param.get_value().sharding.is_equivalent_to(NamedSharding(on, spec), param.ndim), path
    return build, {".".join(map(str, path)): param.get_value() for path, param in nnx.to_flat_state(state)}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return hf.write(tmp_path_factory.mktemp("tiny"))


def assert_params(directory: Path, build: Build, params: dict[str, jax.Array]) -> None:
    want = hf.expected_params(directory, build.config, vocab=build.padded_vocab, experts=build.padded_experts)
    assert params.keys() == want.keys()
    for path, value in want.items():
        for shard in params[path].addressable_shards:
            kept = value[shard.index].astype(params[path].dtype)
            np.testing.assert_array_equal(np.asarray(shard.data), kept, err_msg=f"{path} on {shard.device}")


MESHES = [
    (None, ("tp",)),
    ("cp=2,tp=4", ("tp",)),  # 12 experts over 4; 98 tokens padded to 100
    ("cp=2,tp=4", ("cp", "tp")),  # 12 experts padded to 16
    ("dp=2,cp=2,tp=4", ("dp", "cp", "tp")),  # as many ranks as padded experts: four of them have none
    ("cp=3", ("tp",)),
]


@pytest.mark.parametrize(("mesh", "ep"), MESHES)
def test_every_parameter_on_every_device(tiny: Path, mesh: str | None, ep: tuple[str, ...]) -> None:
    assert len(list(tiny.glob("model-*.safetensors"))) > 3
    build, params = load(SafetensorsSource(tiny), ModelConfig.from_dir(tiny), mesh, ep)
    assert_params(tiny, build, params)


VARIANTS: dict[str, dict[str, Any]] = {
    "no q_lora": dict(q_lora_rank=None),
    "tied": dict(tie_word_embeddings=True),
    "all dense": dict(first_k_dense_replace=3),
    "all experts": dict(first_k_dense_replace=0),
    "two shared": dict(n_shared_experts=2),
    "one layer": dict(num_hidden_layers=1),
}


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS.keys())
def test_variants(tmp_path: Path, changes: dict[str, Any]) -> None:
    hf.write(tmp_path, shard="1GB", **changes)
    build, params = load(SafetensorsSource(tmp_path), ModelConfig.from_dir(tmp_path), "tp=2,cp=2", ("cp", "tp"))
    assert_params(tmp_path, build, params)


def test_transformers_4_config(tmp_path: Path) -> None:
    hf.write(tmp_path)
    new = ModelConfig.from_dir(tmp_path)
    hf.as_transformers_4(tmp_path)
    old = ModelConfig.from_dir(tmp_path)
    assert old == new
    assert_params(tmp_path, *load(SafetensorsSource(tmp_path), old, "tp=2"))


def test_rope_that_is_not_interleaved_keeps_its_order(tmp_path: Path) -> None:
    hf.write(tmp_path, rope_interleave=False)
    config = ModelConfig.from_dir(tmp_path)
    assert not config.rope.interleaved
    _, params = load(SafetensorsSource(tmp_path), config, None)
    stored = SafetensorsSource(tmp_path).read("model.layers.0.self_attn.kv_a_proj_with_mqa.weight")
    np.testing.assert_array_equal(params["dense.mla.kv_a"][0], stored)


DTYPES = [(torch.bfloat16, jnp.bfloat16), (torch.bfloat16, jnp.float32), (torch.float32, jnp.bfloat16)]


@pytest.mark.parametrize(("stored", "wanted"), DTYPES)
def test_dtypes(tmp_path: Path, stored: torch.dtype, wanted: Any) -> None:
    hf.write(tmp_path, dtype=stored)
    build, params = load(SafetensorsSource(tmp_path), ModelConfig.from_dir(tmp_path), "tp=2", dtype=wanted)
    assert {path for path, value in params.items() if value.dtype != wanted} == (
        set() if wanted == jnp.float32 else {"moe.mlp.router", "moe.mlp.bias"}
    )
    assert_params(tmp_path, build, params)


def test_parameters_do_not_alias_the_source(tiny: Path) -> None:
    """A file or array that changes later must not change the model."""
    source = SafetensorsSource(tiny)
    arrays = {name: source.read(name).copy() for name in source.names()}
    build, params = load(ArraySource(arrays), ModelConfig.from_dir(tiny), None)
    for array in arrays.values():
        array.fill(np.nan)
    assert_params(tiny, build, params)


def test_progress_bar_is_drawn_when_asked_for(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = ModelConfig.from_dir(tiny)
    declared = nnx.state(Decoder(Build(config)))
    load_params(SafetensorsSource(tiny), declared, config, None)
    assert capsys.readouterr().err == ""
    load_params(SafetensorsSource(tiny), declared, config, None, progress=True)
    assert "loading weights" in capsys.readouterr().err


@pytest.mark.parametrize(("mesh", "ep"), [(None, ("tp",)), ("cp=2,tp=4", ("cp", "tp"))])
def test_the_mtp_layer(tmp_path: Path, mesh: str | None, ep: tuple[str, ...]) -> None:
    """Its layer is read as the same tensors are as a model's last layer; copies of embedding and head are not read."""
    deeper = ModelConfig.from_dir(hf.write(tmp_path, num_hidden_layers=4))
    config = dataclasses.replace(deeper, num_layers=3, num_mtp_layers=1)
    source = SafetensorsSource(tmp_path)
    arrays = {name: source.read(name) for name in source.names()}
    rng = np.random.default_rng(0)
    own = {"enorm": (32,), "hnorm": (32,), "eh_proj": (32, 64), "shared_head.norm": (32,)}
    copies = {"embed_tokens": (98, 32), "shared_head.head": (98, 32)}
    for name, shape in (own | copies).items():
        arrays[f"model.layers.3.{name}.weight"] = rng.normal(size=shape).astype(np.float32)
    _, want = load(ArraySource({name: arrays[name] for name in source.names()}), deeper, mesh, ep)
    _, params = load(ArraySource(arrays), config, mesh, ep, mtp=True)
    assert {path for path in params if path.startswith("mtp.layer.")} == {
        path.replace("moe.", "mtp.layer.") for path in want if path.startswith("moe.")
    }
    for path, value in params.items():
        if path.startswith("mtp.layer."):
            np.testing.assert_array_equal(value[0], want[path.replace("mtp.layer.", "moe.")][-1], err_msg=path)
    for path, name in (("embed_norm", "enorm"), ("hidden_norm", "hnorm"), ("final_norm", "shared_head.norm")):
        np.testing.assert_array_equal(params[f"mtp.{path}"], arrays[f"model.layers.3.{name}.weight"])
    np.testing.assert_array_equal(params["mtp.project"], arrays["model.layers.3.eh_proj.weight"].T)
    _, without = load(ArraySource(arrays), config, mesh, ep)
    assert without.keys() == {path for path in params if not path.startswith("mtp.")}
