"""Peak anonymous host memory while loading: the local shards and one tensor."""

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
from jax_mla_cp.config import ModelConfig
from tests.checkpoint import hf

RAW = {
    "model_type": "deepseek_v3", **hf.TINY, "vocab_size": 4096, "hidden_size": 1024, "num_hidden_layers": 4,
    "q_lora_rank": 64, "kv_lora_rank": 64, "intermediate_size": 2048, "moe_intermediate_size": 256,
    "n_routed_experts": 16,
}  # fmt: skip

CHILD = """
import ctypes, gc, sys, threading
from pathlib import Path
import jax
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 4)
from flax import nnx
from jax_mla_cp.checkpoint import SafetensorsSource, load_converted, load_params, open_converted, orbax_load
from jax_mla_cp.config import ModelConfig
from jax_mla_cp.mesh import make_mesh, mesh_shape
from jax_mla_cp.model.context import Build
from jax_mla_cp.model.decoder import Decoder

def anonymous():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("RssAnon"))

config = ModelConfig.from_dir(sys.argv[1])
mesh = make_mesh("tp=4") if sys.argv[2] == "mesh" else None
declared = nnx.state(Decoder(Build(config, mesh_shape(mesh) if mesh else None)))

if sys.argv[3] == "blocks":  # as on GPUs
    orbax_load.block_bytes, orbax_load._IN_FLIGHT = (lambda device: 2 << 20), 8 << 20

def load():
    if sys.argv[3] == "safetensors":
        params = load_params(SafetensorsSource(sys.argv[1]), declared, config, mesh)
    else:
        params = load_converted(open_converted(Path(sys.argv[1])), declared, config, mesh)
    return jax.block_until_ready(params)

load()  # compiles; what the compiler keeps is not the loader's
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
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A checkpoint, and its conversion."""
    root = tmp_path_factory.mktemp("memory")
    source = root / "hf"
    source.mkdir()
    (source / "config.json").write_text(json.dumps(RAW))
    shapes = expected_shapes(ModelConfig.from_hf(RAW))
    save_file({name: np.ones(shape, np.float32) for name, shape in shapes.items()}, source / "model.safetensors")
    convert(source, root / "out", progress=False)
    return source, root / "out"


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/status")
@pytest.mark.parametrize("mesh", ["mesh", "none"])
@pytest.mark.parametrize("kind", ["safetensors", "converted", "blocks"])
def test_peak_is_the_shards_and_one_tensor(made: tuple[Path, Path], mesh: str, kind: str) -> None:
    source, out = made
    size = (source / "model.safetensors").stat().st_size
    largest = max(4 * int(np.prod(shape)) for shape in expected_shapes(ModelConfig.from_hf(RAW)).values())
    assert size > 150e6 > 8 * largest

    env = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}  # the loader's memory, not what malloc keeps for later
    command = [sys.executable, "-c", CHILD, str(source if kind == "safetensors" else out), mesh, kind]
    run = subprocess.run(command, capture_output=True, text=True, timeout=300, env=env)
    assert run.returncode == 0, run.stderr
    peak, local = map(int, run.stdout.split())
    assert local >= 0.98 * size
    # Neither the file nor a whole parameter is held a second time; the rest is a compilation and Python's own.
    assert peak < local + largest + 24e6, f"peak {peak / 1e6:.0f} MB, local shards {local / 1e6:.0f} MB"
