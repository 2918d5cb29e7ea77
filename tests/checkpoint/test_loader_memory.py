"""Peak anonymous host memory while loading: the local shards and one tensor, also of a quantized checkpoint."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from jax_mla_cp.checkpoint import expected_shapes
from jax_mla_cp.checkpoint.convert import convert
from jax_mla_cp.config.model import ModelConfig
from tests.helpers import hf_tensors as hf
from tests.helpers import quantize

RAW = {
    "model_type": "deepseek_v3",
    **hf.TINY,
    "vocab_size": 4096,
    "hidden_size": 1024,
    "num_hidden_layers": 4,
    "q_lora_rank": 64,
    "kv_lora_rank": 64,
    "intermediate_size": 2048,
    "moe_intermediate_size": 256,
    "n_routed_experts": 16,
    "n_shared_experts": 2,  # so wide that tp=4 cuts no blocks of 128
}

CHILD = """
import ctypes, gc, sys, threading
from pathlib import Path
import jax
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 4)
jax.config.update("jax_compilation_cache_dir", sys.argv[5])
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
from flax import nnx
from jax_mla_cp.checkpoint import SafetensorsSource, load_converted, load_params, open_converted, orbax_loader
from jax_mla_cp.config.model import ModelConfig
from jax_mla_cp.mesh import make_mesh, mesh_shape
from jax_mla_cp.model.build import Build
from jax_mla_cp.model.decoder import Decoder

def anonymous():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("RssAnon"))

config = ModelConfig.from_dir(sys.argv[1])
mesh = make_mesh("tp=4") if sys.argv[2] == "mesh" else None
declared = nnx.state(Decoder(Build(config, mesh_shape(mesh) if mesh else None, fp8=sys.argv[4] == "True")))

if sys.argv[3] == "blocks":  # as on GPUs
    orbax_loader.block_bytes, orbax_loader._IN_FLIGHT_BYTES = (lambda device: 2 << 20), 8 << 20

def load():
    if sys.argv[3] == "safetensors":
        params = load_params(SafetensorsSource(sys.argv[1]), declared, config, mesh)
    else:
        params = load_converted(open_converted(Path(sys.argv[1])), declared, config, mesh)
    return jax.block_until_ready(params)

load()  # compiles; what the compiler takes and keeps is not the loader's
gc.collect()
ctypes.CDLL("libc.so.6").malloc_trim(0)  # else freed memory would count as held before, and hide a copy
before = peak = anonymous()
done = threading.Event()
def sample():
    global peak
    while not done.wait(0.001):
        peak = max(peak, anonymous())
sampler = threading.Thread(target=sample)
sampler.start()
params = load()
done.set()
sampler.join()
local = sum(shard.data.nbytes for leaf in jax.tree.leaves(params) for shard in leaf.addressable_shards)
print(peak - before, local)
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A checkpoint in float32, the same in FP8, and the first one converted."""
    root = tmp_path_factory.mktemp("memory")
    shapes = expected_shapes(ModelConfig.from_hf(RAW))
    tensors = {name: np.ones(shape, np.float32) for name, shape in shapes.items()}
    for stored in ("float32", "fp8"):
        (root / stored).mkdir()
        raw = RAW | ({"quantization_config": quantize.FP8_CONFIG} if stored == "fp8" else {})
        (root / stored / "config.json").write_text(json.dumps(raw))
        weights = quantize.to_fp8(tensors) if stored == "fp8" else tensors
        save_file(weights, root / stored / "model.safetensors")
    convert(root / "float32", root / "converted", progress=False)
    return {name: root / name for name in ("float32", "fp8", "converted")}


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/status")
@pytest.mark.parametrize(
    ("mesh", "stored", "kind"),
    [
        ("mesh", "float32", "safetensors"),
        ("none", "float32", "safetensors"),
        ("mesh", "float32", "converted"),
        ("none", "float32", "converted"),
        ("mesh", "float32", "blocks"),
        ("none", "float32", "blocks"),
        ("mesh", "fp8", "safetensors"),
        ("mesh", "fp8", "safetensors to bf16"),
    ],
)
def test_peak_is_the_shards_and_one_tensor(
    made: dict[str, Path], tmp_path: Path, mesh: str, stored: str, kind: str
) -> None:
    path = made[stored if kind.startswith("safetensors") else "converted"]
    size = (made[stored] / "model.safetensors").stat().st_size
    shapes = expected_shapes(ModelConfig.from_hf(RAW))
    largest = max(4 * int(np.prod(shape)) for shape in shapes.values())
    assert sum(4 * int(np.prod(shape)) for shape in shapes.values()) > 150e6 > 8 * largest

    env = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}  # the loader's memory, not what malloc keeps for later
    fp8 = stored == "fp8" and kind == "safetensors"
    command = [sys.executable, "-c", CHILD, str(path), mesh, kind.split()[0], str(fp8), str(tmp_path)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=300, env=env)
    assert run.returncode == 0, run.stderr
    peak, local = map(int, run.stdout.split())
    assert local >= 0.98 * size and (local < 1.1 * size or kind.endswith("bf16"))
    # Neither the file nor a whole parameter is held a second time; the rest is Python's own.
    assert peak < local + largest + 8e6, f"peak {peak / 1e6:.0f} MB, local shards {local / 1e6:.0f} MB"
