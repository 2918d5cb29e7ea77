"""The model is built with everything that it needs to know."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import pytest

from jax_mla_cp.launch import plan_build
from jax_mla_cp.step.forward import forward, to_devices
from tests.helpers.synthetic import CONFIG, Driver, random_model


def test_nothing_asks_for_the_devices_while_tracing(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = Driver(random_model(dtype=jnp.dtype(jnp.bfloat16)))
    batch = to_devices(driver.model, driver.planner.dummy_batch(driver.planner.step_shapes[-1]))

    def asked(*args: Any) -> Any:
        raise AssertionError("a module asked for the devices")

    monkeypatch.setattr(jax, "devices", asked)
    monkeypatch.setattr(jax, "default_backend", asked)
    jax.clear_caches()
    jax.jit(forward).trace(driver.model, driver.pages, batch)


def test_implementations_are_resolved_when_a_build_is_planned(monkeypatch: pytest.MonkeyPatch) -> None:
    def planned() -> str:
        return plan_build(CONFIG, None, dtype="float32", ep_axes="tp", attention="xla").grouped_matmul

    assert planned() == "blocks"
    monkeypatch.setattr("jax_mla_cp.launch.model.resolve_grouped_matmul", lambda: "ragged")
    assert planned() == "ragged"
