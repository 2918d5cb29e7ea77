"""The server with its default flags on the GPUs that are here: the built-in model finds the passkeys."""

from __future__ import annotations

from pathlib import Path

import jax
import pytest

from jax_mla_cp.mesh import MeshShape
from tests.helpers import passkeys
from tests.helpers.live import serving


@pytest.mark.parametrize("mesh", ["tp=1", "cp=2", "tp=2"])
def test_passkeys(mesh: str, tmp_path: Path) -> None:
    pytest.importorskip("fastapi", reason="the server's packages are not installed")
    if MeshShape.parse(mesh).devices > jax.device_count():
        pytest.skip(f"{mesh} needs {MeshShape.parse(mesh).devices} GPUs, there are {jax.device_count()}")
    prompts = passkeys.prompts()
    with serving(tmp_path / "server.log", ("--platform", "cuda", "--mesh", mesh, "--no-warmup")) as live:
        answers = passkeys.ask(live.url, prompts, live.model)
        assert "FlashAttention-3" in live.log()
        live.wait_until_idle()
    assert not passkeys.missed(prompts, answers)
