"""An engine over the stand-in for the model, which every request and page must have left at the end of its test."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from jax_mla_cp.engine import Engine
from tests.helpers.engine_requests import is_idle
from tests.helpers.standin import PageModel


@pytest.fixture
def model() -> PageModel:
    return PageModel()


@pytest.fixture
def engine(model: PageModel) -> Iterator[Engine]:
    engine = Engine(model)
    engine.start()
    yield engine
    if model.gate:
        model.gate.release(10_000)
    ended = engine.drain(timeout=30)
    engine.stop(timeout=30)
    assert ended and is_idle(engine)
