"""Converted checkpoints load the same bits as the safetensors, on any mesh."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import torch
from flax import nnx
from jax.sharding import NamedSharding
from orbax.checkpoint import v1 as ocp
from safetensors.torch import save_file

import jax_mla_cp as mla
from jax_mla_cp.checkpoint import (
    CheckpointError,
    SafetensorsSource,
    load_converted,
    load_params,
    open_converted,
    orbax_loader,
)
from jax_mla_cp.checkpoint.convert import convert
from jax_mla_cp.checkpoint.inspect import inspect
from jax_mla_cp.config.model import ModelConfig
from jax_mla_cp.config.quantization import FP8
from jax_mla_cp.mesh import MeshShape, make_mesh, mesh_shape
from jax_mla_cp.model.build import Build
from jax_mla_cp.model.decoder import Decoder
from tests.checkpoint import test_loader_quantized
from tests.helpers import hf_tensors as hf
from tests.helpers.random_weights import random_weights


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A bfloat16 checkpoint of 259 tokens and 12 experts, and its conversion."""
    root = tmp_path_factory.mktemp("pair")
    source = hf.write(root / "hf", dtype=torch.bfloat16, vocab_size=259)
    convert(source, root / "out", progress=False)
    return source, root / "out"


def declare(config: ModelConfig, mesh: str | None, ep: tuple[str, ...], dtype: Any) -> tuple[Any, nnx.State]:
    on = make_mesh(mesh) if mesh else None
    return on, nnx.state(Decoder(Build(config, mesh_shape(on) if on else None, ep, jnp.dtype(dtype))))


def assert_same(got: nnx.State, want: nnx.State) -> None:
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for (path, a), (_, b) in zip(nnx.to_flat_state(got), nnx.to_flat_state(want), strict=True):
        x, y = a.get_value(), b.get_value()
        assert x.dtype == y.dtype and x.sharding.is_equivalent_to(y.sharding, x.ndim), path
        for left, right in zip(x.addressable_shards, y.addressable_shards, strict=True):
            assert left.device == right.device
            np.testing.assert_array_equal(np.asarray(left.data), np.asarray(right.data), err_msg=str(path))


MESHES = [
    (None, ("tp",)),
    ("tp=2,cp=2", ("tp",)),  # 259 tokens padded to 260
    ("cp=2,tp=4", ("cp", "tp")),  # 12 experts padded to 16
    ("dp=2,cp=2,tp=4", ("dp", "cp", "tp")),  # as many ranks as padded experts: four of them have none
    ("cp=3", ("tp",)),
]


@pytest.mark.parametrize("blocks", [None, 4096], ids=["whole", "blocks"])
@pytest.mark.parametrize(("mesh", "ep"), MESHES)
def test_every_parameter_on_every_device(
    pair: tuple[Path, Path], mesh: str | None, ep: tuple[str, ...], blocks: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In one piece, as on a CPU, and in blocks of a few layers or experts, as on GPUs."""
    monkeypatch.setattr(orbax_loader, "block_bytes", lambda device: blocks)
    source, out = pair
    config = ModelConfig.from_dir(out)
    on, declared = declare(config, mesh, ep, jnp.float32)
    want = load_params(SafetensorsSource(source), declared, config, on)
    assert_same(load_converted(open_converted(out), declared, config, on), want)


def test_stored_in_its_own_dtype(pair: tuple[Path, Path], tmp_path: Path) -> None:
    source, out = pair
    assert {a.dtype for a in open_converted(out).arrays.values()} == {np.dtype(ml_dtypes.bfloat16)}
    config = ModelConfig.from_dir(out)
    _, declared = declare(config, None, ("tp",), jnp.bfloat16)
    assert_same(
        load_converted(open_converted(out), declared, config, None),
        load_params(SafetensorsSource(source), declared, config, None),
    )


def test_orbax_reads_it(pair: tuple[Path, Path]) -> None:
    """Without this package: whole, and sharded with padding."""
    _, out = pair
    config = ModelConfig.from_dir(out)
    on, declared = declare(config, "cp=2,tp=4", ("cp", "tp"), jnp.float32)
    want = dict(nnx.to_flat_state(load_converted(open_converted(out), declared, config, on)))
    stored = ocp.load(out / "weights")
    assert stored["moe"]["mlp"]["gate_up"].shape == (2, 12, 2, 16, 32)

    def abstract(param: nnx.Variable) -> jax.ShapeDtypeStruct:
        value, spec = param.get_value(), param.get_metadata("spec")
        return jax.ShapeDtypeStruct(value.shape, value.dtype, sharding=NamedSharding(on, spec))

    context = ocp.Context()
    context.array.loading.enable_padding_and_truncation = True
    with context:
        tree = {path: abstract(param) for path, param in nnx.to_flat_state(declared)}
        got = ocp.load(out / "weights", nnx.traversals.unflatten_mapping(tree))
    flat = nnx.traversals.flatten_mapping(got)
    assert flat.keys() == want.keys()
    for path, value in flat.items():
        np.testing.assert_array_equal(np.asarray(value), np.asarray(want[path].get_value()), err_msg=str(path))


def test_load_takes_either_kind(checkpoint: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source = checkpoint("odd_vocab")[1]
    convert(source, tmp_path / "out", progress=False)
    with caplog.at_level("INFO"):
        models = [mla.load(where, mesh=make_mesh("tp=2"), progress=False) for where in (source, tmp_path / "out")]
    (one, tokens_one), (two, tokens_two) = models
    assert one.build == two.build
    assert_same(two.params, one.params)
    assert tokens_one is not None and tokens_two is not None and tokens_one.encode("ab") == tokens_two.encode("ab")
    assert sum("GB/s" in record.message for record in caplog.records) == 2, "both say how fast, in the same words"


def test_a_model_whose_queries_have_no_low_rank(tmp_path: Path) -> None:
    """Its parameter `mla.q` is no matrix in FP8."""
    source = hf.write(tmp_path / "hf", dtype=torch.bfloat16, vocab_size=259, q_lora_rank=None)
    convert(source, tmp_path / "out", progress=False)
    assert open_converted(tmp_path / "out").weights == "bf16"
    (got, _), (want, _) = (mla.load(path, dtype="bfloat16") for path in (tmp_path / "out", source))
    assert_same(got.params, want.params)


def test_other_parameters_than_the_model_has(pair: tuple[Path, Path]) -> None:
    _, out = pair
    config = ModelConfig.from_hf({"model_type": "deepseek_v3", **hf.TINY, "vocab_size": 300, "q_lora_rank": None})
    _, declared = declare(config, None, ("tp",), jnp.float32)
    with pytest.raises(CheckpointError) as caught:
        load_converted(open_converted(out), declared, config, None)
    message = str(caught.value)
    assert "embed: expected [300, 32], got [259, 32]" in message
    assert "moe.mla.q: missing" in message and "moe.mla.q_a: unexpected" in message


WORKER = """
import sys
from pathlib import Path
import jax
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 2)
jax.distributed.initialize(sys.argv[1], 2, int(sys.argv[2]))
import numpy as np
from flax import nnx
import jax_mla_cp as mla
from jax_mla_cp.checkpoint import ConvertedCheckpoint, load_converted
from jax_mla_cp.model.decoder import Decoder
source, out = Path(sys.argv[3]), Path(sys.argv[4]) / sys.argv[2]
mesh = mla.make_mesh("tp=4")
want, _ = mla.load(source, mesh=mesh, progress=False)
got = load_converted(ConvertedCheckpoint.read(out), nnx.state(Decoder(want.build)), want.config, mesh)
for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want.params), strict=True):
    for a, b in zip(x.addressable_shards, y.addressable_shards, strict=True):
        np.testing.assert_array_equal(np.asarray(a.data), np.asarray(b.data))
"""


def test_each_process_reads_only_its_shards(pair: tuple[Path, Path], tmp_path: Path) -> None:
    """Each has a copy that lacks the other's experts: of 12 over 4 devices, the first process keeps 0 to 5."""
    source, out = pair
    for process in range(2):
        shutil.copytree(out, tmp_path / str(process))
        state = tmp_path / str(process) / "weights" / "state"
        chunks = [path for path in state.glob("moe.mlp.*/c/**/*") if path.is_file()]
        experts = [path for path in chunks if path.relative_to(state).parts[0] in ("moe.mlp.gate_up", "moe.mlp.down")]
        others = [path for path in experts if int(path.relative_to(state).parts[3]) // 6 != process]
        assert 2 * len(others) == len(experts) == 2 * 2 * 12
        for path in others:
            path.unlink()
    with socket.create_server(("127.0.0.1", 0)) as probe:
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    env = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", WORKER, address, str(i), str(source), str(tmp_path)], env=env, stderr=subprocess.PIPE
        )
        for i in range(2)
    ]
    errors = [worker.communicate(timeout=300)[1].decode() for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0], errors


@pytest.mark.parametrize("weights", ["auto", "bf16"])
@pytest.mark.parametrize("kind", ["fp8", "int4"])
def test_quantized_checkpoints_and_the_mtp_layer(
    tmp_path: Path, kind: str, weights: Literal["auto", "bf16"], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Kept in FP8 or dequantized while converting: what the loader makes of the Hugging Face directory."""
    raw = test_loader_quantized.RAGGED | {"num_nextn_predict_layers": 1}
    quantization, to, _ = test_loader_quantized.KINDS[kind]
    config = ModelConfig.from_hf(raw | {"quantization_config": quantization})
    tensors = to(random_weights(config, 3, mtp=True))
    embedding = "model.embed_tokens.weight"
    tensors[embedding] = tensors[embedding].astype(ml_dtypes.bfloat16)
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf/config.json").write_text(json.dumps(raw | {"quantization_config": quantization}))
    save_file(
        {
            n: torch.from_numpy(t.view(np.uint8)).view(torch.float8_e4m3fn)
            if t.dtype == FP8
            else torch.from_numpy(t.view(np.int16)).view(torch.bfloat16)
            if t.dtype == ml_dtypes.bfloat16
            else torch.from_numpy(t)
            for n, t in tensors.items()
        },
        tmp_path / "hf/model.safetensors",
    )
    out = tmp_path / "out"
    convert(tmp_path / "hf", out, weights=weights, progress=False)
    kept = "fp8" if weights == "auto" else "bf16"
    assert open_converted(out).weights == kept
    shown = inspect(out, mesh=MeshShape(tp=2, cp=2))
    assert shown["device"]["dtype"] == ("bfloat16 and FP8" if kept == "fp8" else "bfloat16"), "the embedding's"
    if kept == "fp8" and kind == "fp8":
        assert shown["dtypes"]["float32"]["parameters"] > shown["dtypes"]["bfloat16"]["parameters"], "dequantized"
        stored = open_converted(out).arrays
        assert "dense.mlp.down.q" in stored, "tp=2 cuts its blocks, which a conversion does not know"
    for mtp, dtype, blocks in (
        (True, "bfloat16", None),
        (False, "float32" if kept == "fp8" else "bfloat16", None),
        (True, "bfloat16", 4096),
    ):
        monkeypatch.setattr(orbax_loader, "block_bytes", lambda device, blocks=blocks: blocks)
        arguments: dict[str, Any] = {"mesh": make_mesh("tp=2,cp=2"), "dtype": dtype, "mtp": mtp, "progress": False}
        got, _ = mla.load(out, **arguments)
        want, _ = mla.load(tmp_path / "hf", weights=kept, **arguments)
        assert got.build == want.build
        assert_same(got.params, want.params)
    assert convert(tmp_path / "hf", out, progress=False).skipped > 0, "it resumes with the same choice"
    other: Literal["bf16", "fp8"] = "bf16" if kept == "fp8" else "fp8"
    with pytest.raises(
        mla.ConfigError, match=f"weights: .* was converted with {kept} weights, got '{other}'.*--weights {other}"
    ):
        mla.load(out, weights=other)
