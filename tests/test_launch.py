"""The options that programs share: bounds, and what excludes each other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import pytest

from jax_mla_cp import launch
from jax_mla_cp.config.errors import ConfigError
from jax_mla_cp.launch import Devices, LaunchOptions
from jax_mla_cp.mesh import make_mesh

BAD: list[tuple[dict[str, Any], str]] = [
    ({"page_size": 0}, "page_size: must be a whole number from 1"),
    ({"prefill_chunk": 0}, "prefill_chunk: must be a whole number from 1"),
    ({"kv_pages": 0}, "kv_pages: must be a whole number from 1"),
    ({"max_model_len": 1}, "max_model_len: must be a whole number from 2"),
    ({"max_running": 5000}, "max_running: must be a whole number from 1 to 4096, got 5000"),
    ({"memory_fraction": 1.5}, "memory_fraction: must be above 0 and at most 1, got 1.5"),
    ({"memory_fraction": float("nan")}, "memory_fraction: must be above 0"),
    ({"compile_cache": ""}, "compile_cache: must be a directory"),
    ({"speculative": "mpt"}, "speculative: must be one of off | mtp, got 'mpt'. Did you mean mtp?"),
    ({"draft_tokens": 2}, "draft_tokens: without speculation there are no drafts. Add speculative='mtp'."),
    ({"draft_tokens": 5, "speculative": "mtp"}, "draft_tokens: must be a whole number from 1 to 4, got 5"),
    ({"draft_tokens": 0, "speculative": "mtp"}, "draft_tokens: must be a whole number from 1 to 4, got 0"),
]


@pytest.mark.parametrize(("options", "message"), BAD)
def test_options_that_cant_work(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as refused:
        LaunchOptions(**options)
    assert str(refused.value).startswith(message)


def test_speculation_drafts_one_token_by_default() -> None:
    assert LaunchOptions().draft_tokens is None
    assert LaunchOptions(speculative="mtp").draft_tokens == 1
    assert LaunchOptions(speculative="mtp", draft_tokens=3).draft_tokens == 3


def test_a_model_is_named_after_its_directory() -> None:
    assert LaunchOptions().model_name == "jax-mla-cp-tiny"
    assert LaunchOptions(model=Path("/models/Deep Seek V3")).model_name == "Deep-Seek-V3"


def test_a_model_without_the_layer_is_told_in_the_options_words(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*_: Any, **given: Any) -> None:
        assert given["mtp"]
        raise ConfigError("mtp", "the model has no layer for multi-token prediction.")

    monkeypatch.setattr(launch.model, "load", load)
    with pytest.raises(ConfigError, match=r"speculative: the model has no layer for multi-token prediction\."):
        launch.load_model(LaunchOptions(speculative="mtp"), Devices("cpu", make_mesh("tp=1", jax.devices()[:1]), None))
