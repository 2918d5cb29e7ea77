"""The whole step with attention as FFI calls (on CPU their handlers are plain loops), at DeepSeek-V3's head sizes."""

from __future__ import annotations

import re

import jax.numpy as jnp
import numpy as np
import pytest

from jax_mla_cp.batch.shapes import StepShape
from jax_mla_cp.config.errors import ConfigError
from jax_mla_cp.step.planner import Planner
from jax_mla_cp.step.runner import compile_step
from tests.helpers.speculative import REAL_DIMS, OneBucket, generate
from tests.helpers.speculative import model as speculative
from tests.helpers.synthetic import REAL_DIMS_CONFIG, Driver, random_model, step_of, tempered
from tests.test_cache import copies_of

BF16 = jnp.dtype(jnp.bfloat16)
LENGTHS = (70, 9, 1, 40)


def play(mesh: str | None, attention: str, form: str) -> np.ndarray:
    """Logits of a prefill of several requests, then of a step that mixes a chunk, a decoding token and drafts."""
    model = tempered(random_model(mesh, config=REAL_DIMS_CONFIG, dtype=BF16, attention=attention))
    driver = Driver(model, page_size=64, max_model_len=128, form=form)
    rng = np.random.default_rng(0)
    requests = [driver.request() for _ in LENGTHS]
    first = driver.step([(r, rng.integers(0, 250, n).tolist()) for r, n in zip(requests, LENGTHS, strict=True)])
    second = driver.step([(r, rng.integers(0, 250, n).tolist()) for r, n in zip(requests, (30, 1, 4), strict=False)])
    return np.concatenate([first, second]).astype(np.float64)


def difference(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


@pytest.mark.parametrize("form", ["expanded", "absorbed"])
def test_the_step_agrees_with_xla(form: str) -> None:
    """In bfloat16 the two round at other places; the next token's logits differ by much more."""
    xla = play(None, "xla", form)
    fa3 = play("tp=2,cp=2", "fa3", form)
    assert difference(fa3, xla) < 3e-2
    assert difference(np.roll(fa3, 1, axis=0), xla) > 0.5


def test_the_compiled_step_calls_each_form_and_copies_no_cache() -> None:
    """Once in each of the two scans. (What XLA:CPU copies beside the cache is not what a GPU does: tests/gpu.)"""
    model = random_model("tp=2,cp=2", config=REAL_DIMS_CONFIG, dtype=BF16, attention="fa3")
    driver = Driver(model, page_size=64, max_model_len=512)
    step = next(s for s in reversed(driver.planner.step_shapes) if s.expanded_keys and s.absorbed_tokens < s.tokens)
    text = compile_step(driver.planner, step).as_text()
    calls = re.findall(r'custom_call_target="(mla_\w+)"', text)
    assert sorted(calls) == ["mla_decode"] * 2 + ["mla_prefill_expanded"] * 2
    assert not copies_of(text, driver.pages.shape)


def test_speculation_changes_no_token() -> None:
    """Verified drafts and recycled ones are calls of decode's kernel: in the layers' scan, in the MTP layer, once more there."""
    prompts = [[5, 1, 77, 30], [9]]
    want = generate(OneBucket(speculative(**REAL_DIMS), 0, page=64), prompts, 9)
    steps = OneBucket(speculative("tp=2,cp=2", attention="fa3", **REAL_DIMS), 2, page=64)
    got = generate(steps, prompts, 9)
    assert got.tokens == want.tokens
    assert got.speculation is not None and 0 < got.speculation.num_accepted < got.speculation.num_drafts
    calls = re.findall(r'custom_call_target="(mla_\w+|schedule_splits)"', steps.program.as_text())
    assert sorted(calls) == ["mla_decode"] * 3 + ["schedule_splits"], "once, also for the MTP layer"


def test_absorbed_rows_have_their_own_part_of_a_step() -> None:
    """Few of them beside expanded ones take the form's products for 128 tokens only; many, for all; alone, no keys."""
    model = random_model(config=REAL_DIMS_CONFIG)
    planner = Planner.create(model, cache_tokens=4096, max_requests=4, max_model_len=512)
    largest = planner.buckets[-1]
    assert planner.step_shapes[:1] == (StepShape(planner.buckets[0], planner.buckets[0], 0),)
    assert planner.step_shapes[-3:] == (
        StepShape(largest, largest, 0),
        StepShape(largest, 128, 1152),
        StepShape(largest, largest, 1152),
    )
    for step in planner.step_shapes:
        assert step_of(planner, planner.dummy_batch(step)) == step


def test_a_page_is_a_multiple_of_the_kernels_tile() -> None:
    model = random_model(config=REAL_DIMS_CONFIG, dtype=BF16, attention="fa3")
    with pytest.raises(
        ConfigError,
        match=r"page_size: must be a multiple of 64 for FlashAttention-3.*got 96\. Use page_size=128, or attention='xla'",
    ):
        Planner.create(model, cache_tokens=4096, page_size=96)
