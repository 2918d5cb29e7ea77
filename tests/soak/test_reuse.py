"""A shared prefix is computed once."""

from __future__ import annotations

import random
from collections.abc import Callable

from tests.helpers.live import PAGE, Live
from tests.helpers.soak_requests import ask_alone, differ, prompt
from tests.helpers.soak_sizes import Sizes

OWN = 16
"""Tokens of each prompt after the prefix."""


def test_a_shared_prefix_costs_a_tenth(live: Live, sizes: Sizes, record: Callable[..., None]) -> None:
    rng = random.Random(2)
    prefix = prompt(sizes.prefix, rng)
    prompts = [[*prefix, *prompt(OWN, rng)] for _ in range(sizes.repeats)]
    salt = "reuse"
    answers = [ask_alone(live, each, 8, cache_salt=salt) for each in prompts]
    computed = sum(answer.usage["prompt_tokens"] - answer.cached for answer in answers)
    without = sum(answer.usage["prompt_tokens"] for answer in answers)
    fewer = without / computed
    record(
        "shared prefix",
        prompts=len(prompts),
        prefix=sizes.prefix,
        computed=computed,
        without=without,
        fewer=round(fewer, 1),
    )
    assert answers[0].cached == 0 and all(a.cached >= sizes.prefix - PAGE for a in answers[1:])
    # At best: the prefix once, and of each prompt its own tokens and what does not fill the prefix's last page.
    assert fewer >= min(10, 0.5 * sizes.repeats)
    fresh = ask_alone(live, prompts[-1], 8, cache_salt="other")
    assert fresh.cached == 0, "another salt shares nothing"
    assert differ(answers[-1], fresh) is None, "reused latents are those that would be computed"
    live.wait_until_idle()
