"""Each process reads of a checkpoint what its own devices keep, and no more."""

from __future__ import annotations

import json
import re
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from jax_mla_cp.checkpoint import expected_shapes
from jax_mla_cp.config.model import ModelConfig
from tests.helpers import hf_tensors as hf
from tests.helpers.processes import environment

ROOT = Path(__file__).parent.parent.parent
RAW: dict[str, Any] = {
    "model_type": "deepseek_v3",
    **hf.TINY,
    "vocab_size": 2048,
    "hidden_size": 1024,
    "moe_intermediate_size": 256,
    "n_routed_experts": 8,
}
"""An expert's matrix is 1 MiB, so that a page too many is nothing."""
SHAPES = expected_shapes(ModelConfig.from_hf(RAW))
EXPERT = re.compile(r"\.mlp\.experts\.(\d+)\.")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("reading")
    (directory / "config.json").write_text(json.dumps(RAW))
    save_file({name: np.ones(shape, np.float32) for name, shape in SHAPES.items()}, directory / "model.safetensors")
    return directory


def reads(count: int, checkpoint: Path) -> list[dict[str, Any]]:
    """Bytes that each of `processes` reads, which share two devices."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    command = [sys.executable, "-m", "tests.helpers.reading_worker", address, str(count)]
    workers = [
        subprocess.Popen(
            [*command, str(i), str(checkpoint)], cwd=ROOT, env=environment(), stdout=subprocess.PIPE, text=True
        )
        for i in range(count)
    ]
    told = [worker.communicate(timeout=300)[0] for worker in workers]
    assert [worker.returncode for worker in workers] == [0] * count
    return [json.loads(next(line for line in text.splitlines() if line.startswith("{"))) for text in told]


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/smaps")
def test_two_processes_read_half_of_the_experts_each(made: Path) -> None:
    sizes = {name: 4 * int(np.prod(shape)) for name, shape in SHAPES.items()}
    whole = sum(sizes.values())
    experts = sum(size for name, size in sizes.items() if EXPERT.search(name))
    assert experts == 2 * 8 * 3 * 2**20 and whole > 55e6, "two layers of eight experts with three matrices"
    (alone,) = reads(1, made)
    assert alone["experts"] == experts and alone["experts"] + alone["others"] >= whole
    assert alone["touched"] >= 0.99 * whole, "negative control: one process reads all"
    two = reads(2, made)
    numbers = [{int(match[1]) for name in each["names"] if (match := EXPERT.search(name))} for each in two]
    assert sorted(map(sorted, numbers)) == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert {*two[0]["names"], *two[1]["names"]} == {*alone["names"]}
    for each in two:
        assert each["experts"] == experts // 2
        assert each["others"] < 0.75 * alone["others"], "embedding, head, heads and dense layers are divided too"
        assert each["experts"] + each["others"] < 0.55 * whole
        assert each["touched"] < 0.65 * whole, "slices of rows touch whole pages"
