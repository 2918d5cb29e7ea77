"""Everything here is marked `gpu`, and skipped where JAX doesn't run on a Hopper GPU."""

from __future__ import annotations

from pathlib import Path

import jax
import pytest

from jax_mla_cp import platform

if platform._has_gpu():
    platform.add_xla_flags(platform._FLAGS["cuda"])  # programs are compiled as the server's


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            item.add_marker(pytest.mark.gpu)


@pytest.fixture(scope="session", autouse=True)
def hopper() -> jax.Device:
    """Asked for when the first test runs, not at import: other tests set JAX up first."""
    device = jax.devices()[0]
    if getattr(device, "compute_capability", None) != "9.0":
        pytest.skip(f"needs a Hopper GPU, JAX runs on {device.device_kind}")
    return device
