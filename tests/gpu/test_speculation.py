"""Speculation through the kernels: the same tokens as without, on a cache that is full of NaN at first."""

from __future__ import annotations

import numpy as np
import pytest

from tests.helpers.speculative import REAL_DIMS, OneBucket, generate, model
from tests.test_cache import copies_of

PROMPTS = [np.random.default_rng(i).integers(0, 250, n).tolist() for i, n in enumerate((150, 9, 1, 62, 63, 64))]
COUNTS = [60, 100, 90, 40, 3, 70]


@pytest.mark.parametrize("draft_tokens", [1, 2, 4])
def test_tokens_are_the_same(draft_tokens: int) -> None:
    """Rows of up to 5 queries in decode's kernel, pages that begin within drafts, drafts made from drafts."""
    built = model(attention="fa3", **REAL_DIMS)
    plain, steps = (
        OneBucket(built, 0, page=64, max_model_len=256),
        OneBucket(built, draft_tokens, page=64, max_model_len=256),
    )
    plain.poison()
    steps.poison()
    want, got = generate(plain, PROMPTS, COUNTS), generate(steps, PROMPTS, COUNTS)
    assert got.tokens == want.tokens
    assert got.idle
    assert got.speculation is not None
    print(f"{draft_tokens} draft tokens: {got.speculation}")
    assert 0.2 < got.speculation.acceptance_rate < 0.95
    assert not copies_of(steps.program.as_text(), steps.pages().shape)
