"""Log-probabilities of given tokens, from the engine: those of float64 NumPy, and the same on every mesh."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jax_mla_cp.batch.arrays import Batch
from jax_mla_cp.batch.packing import DeviceBatch
from jax_mla_cp.eval.in_process import prompt_logprobs
from jax_mla_cp.launch import load
from jax_mla_cp.mesh import make_mesh
from jax_mla_cp.step import runner
from jax_mla_cp.step.planner import Planner
from tests.helpers.checkpoints import read_weights
from tests.helpers.reference import forward

Checkpoints = Callable[[str], tuple[dict[str, Any], Path]]

# Chunks of 50 tokens, two windows at a time, windows of different lengths: rows of all kinds.
WINDOWS = [np.random.default_rng(i).integers(0, 512, n).tolist() for i, n in enumerate((150, 130, 101))]


@pytest.fixture(scope="module")
def logprobs(checkpoint: Checkpoints) -> Callable[..., list[np.ndarray]]:
    @functools.cache
    def get(mesh: str | None, form: str = "auto") -> list[np.ndarray]:
        model, _ = load(checkpoint("v3")[1], mesh=make_mesh(mesh) if mesh else None)
        sizes: dict[str, Any] = {"cache_tokens": 320, "page_size": 16, "max_requests": 2, "form": form}
        planner = Planner.create(model, max_model_len=150, prefill_chunk=50, **sizes)
        steps = runner.Runner(planner, prefill_chunk=50, max_running=2, max_model_len=150)
        done: list[None] = []
        found = prompt_logprobs(steps, WINDOWS, lambda: done.append(None))
        assert len(done) == len(WINDOWS)
        return list(found)

    return get


@pytest.fixture(scope="module")
def exact(checkpoint: Checkpoints) -> list[np.ndarray]:
    path = checkpoint("v3")[1]
    config, weights = load(path)[0].config, read_weights(path)
    out = []
    for window in WINDOWS:
        logits = forward(config, weights, window[:-1]).logits
        shifted = logits - logits.max(-1, keepdims=True)
        every = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
        out.append(every[np.arange(len(window) - 1), window[1:]])
    return out


def furthest(got: list[np.ndarray], want: list[np.ndarray]) -> float:
    assert [len(g) for g in got] == [len(w) for w in want] == [len(window) - 1 for window in WINDOWS]
    return max(float(np.abs(g - w).max() / np.abs(w).max()) for g, w in zip(got, want, strict=True))


def test_they_are_those_of_float64(logprobs: Callable[..., list[np.ndarray]], exact: list[np.ndarray]) -> None:
    assert furthest(logprobs(None), exact) < 1e-4
    moved = [np.roll(w, 1) for w in exact]
    assert furthest(logprobs(None), moved) > 0.1, "those of the tokens beside them are others"


@pytest.mark.parametrize(
    ("mesh", "form"), [("tp=2,cp=2", "auto"), ("cp=3", "expanded"), ("dp=2", "absorbed"), ("dp=2,cp=2", "auto")]
)
def test_they_are_the_same_on_every_mesh(logprobs: Callable[..., list[np.ndarray]], mesh: str, form: str) -> None:
    assert furthest(logprobs(mesh, form), logprobs(None)) < 1e-5


def test_a_wrong_plan_is_noticed(logprobs: Callable[..., list[np.ndarray]], monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control: with the ranks' first rows seeing one key less, the same run gives other numbers."""
    want = logprobs(None)
    pack = runner.pack

    def wrong(batch: Batch, mesh: Any) -> DeviceBatch:
        for rows in (batch.expanded, batch.absorbed):
            rows.kv_len[rows.kv_len > 1] -= 1
        return pack(batch, mesh)

    monkeypatch.setattr(runner, "pack", wrong)
    logprobs.cache_clear()  # type: ignore[attr-defined]
    assert furthest(logprobs("tp=2,cp=2"), want) > 1e-3
    logprobs.cache_clear()  # type: ignore[attr-defined]
