"""Settings made before JAX starts; those of the user stay."""

from __future__ import annotations

import os

import jax
import pytest
from jax._src import xla_bridge

from jax_mla_cp import platform
from jax_mla_cp.config.errors import ConfigError

HIDING = "--xla_gpu_enable_latency_hiding_scheduler"
GRAPHS = "--xla_gpu_command_buffer_scheduling_mode=CONCURRENT"


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch) -> dict[str, object]:
    """JAX has not started, there is a GPU; returns what JAX is told."""
    told: dict[str, object] = {}
    monkeypatch.setattr(xla_bridge, "backends_are_initialized", lambda: False)
    monkeypatch.setattr(jax.config, "update", told.__setitem__)
    monkeypatch.setattr(jax, "devices", lambda *_: [])
    for name in ("XLA_FLAGS", *platform._MEMORY_FRACTION):
        monkeypatch.setenv(name, "")  # so that it is restored
        monkeypatch.delenv(name)
    return told


def test_gpu(fresh: dict[str, object]) -> None:
    assert platform.setup("cuda", 8) == "cuda"
    assert os.environ["XLA_FLAGS"] == f"{HIDING}=true {GRAPHS}"
    assert os.environ["XLA_PYTHON_CLIENT_MEM_FRACTION"] == "0.92"
    assert fresh == {"jax_platforms": "cuda,cpu"}


def test_what_the_user_sets_stays(fresh: dict[str, object], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XLA_FLAGS", f"--xla_dump_to=x {HIDING}=false")
    monkeypatch.setenv("XLA_CLIENT_MEM_FRACTION", "0.5")  # jaxlib refuses both names together
    platform.setup("cuda", 8)
    assert os.environ["XLA_FLAGS"] == f"--xla_dump_to=x {HIDING}=false {GRAPHS}"
    assert "XLA_PYTHON_CLIENT_MEM_FRACTION" not in os.environ


def test_cpu(fresh: dict[str, object]) -> None:
    assert platform.setup("cpu", 8) == "cpu"
    assert os.environ["XLA_FLAGS"] == "--xla_cpu_collective_call_terminate_timeout_seconds=3600"
    assert fresh == {"jax_platforms": "cpu", "jax_num_cpu_devices": 8}


def test_an_unknown_platform(fresh: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=r"platform: must be one of auto \| cpu \| cuda, got 'tpu'"):
        platform.setup("tpu", 1)  # type: ignore[arg-type]
    assert not fresh
