"""The timing of the engine without a model: it counts the steps in which all decode, and no other time."""

from __future__ import annotations

import pytest

from jax_mla_cp.bench.engine_host import NullRunner, host_seconds
from tests.helpers.byte_tokenizer import byte_tokenizer


def test_steps_are_timed() -> None:
    runner = NullRunner(max_running=4, prefill_chunk=64, pages_per_group=40, page_size=8, dp=2, cp=3, token=65)
    seconds = host_seconds(runner, requests=8, steps=20, tokenizer=byte_tokenizer())
    assert len(seconds) >= 15 and all(0 < s < 1 for s in seconds)


def test_what_does_not_fit_is_told() -> None:
    with pytest.raises(ValueError, match="the cache has 80"):
        host_seconds(NullRunner(max_running=4, prefill_chunk=64, pages_per_group=10, page_size=8), requests=1, steps=99)
