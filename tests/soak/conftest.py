"""Sizes of the soak, and a place for its measurements."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.soak_sizes import FULL, SMALL, Sizes

_RESULTS = Path("build/soak")
_KEPT: dict[str, dict[str, Any]] = {}


@pytest.fixture(scope="session")
def sizes() -> Sizes:
    """Those of `make soak` where SOAK is set, else those of `make test`."""
    return FULL if os.environ.get("SOAK") else SMALL


@pytest.fixture
def record(sizes: Sizes) -> Callable[..., None]:
    """`record(name, key=value, ..)` keeps measured numbers: of a full run in build/soak/NAME.json too."""

    def keep(name: str, **numbers: Any) -> None:
        _KEPT.setdefault(name, {}).update(numbers)
        if sizes is FULL:
            _RESULTS.mkdir(parents=True, exist_ok=True)
            (_RESULTS / f"{name}.json").write_text(json.dumps(_KEPT[name], indent=1) + "\n")

    return keep


def pytest_terminal_summary(terminalreporter: Any) -> None:
    if _KEPT:
        terminalreporter.section("soak: what was measured")
    for name, numbers in _KEPT.items():
        terminalreporter.write_line(f"{name}: " + ", ".join(f"{key} {value}" for key, value in numbers.items()))
