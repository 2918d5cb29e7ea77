"""A long prompt does not stall those who are being answered."""

from __future__ import annotations

import asyncio
import itertools
import random
import time
from collections.abc import Callable

import httpx
import numpy as np

from tests.live import CHUNK, Live
from tests.soak.ask import TIMEOUT, ask, ask_alone, prompt, stream
from tests.soak.sizes import Sizes

RUNNING = 4


async def _beside(live: Live, long: list[int], rng: random.Random) -> list[float]:
    """Gaps between tokens of running requests, of those that began or ended while the long prompt was prefilled."""
    async with httpx.AsyncClient(timeout=TIMEOUT) as client:
        tokens = 40 + 4 * len(long) // CHUNK
        running = [asyncio.ensure_future(stream(client, live, prompt(8, rng), tokens)) for _ in range(RUNNING)]
        await asyncio.sleep(1.0)
        started = time.perf_counter()
        await ask(client, live, long, 1)
        ended = time.perf_counter()
        streams = [[moment for moment, _ in each] for each in await asyncio.gather(*running)]
    return [b - a for each in streams for a, b in itertools.pairwise(each) if a < ended and b > started]


def _seconds_of_a_chunk(live: Live, long: list[int]) -> float:
    """Of the steps that prefill the prompt with nothing beside it, the mean."""
    started = time.perf_counter()
    ask_alone(live, long, 1)
    return (time.perf_counter() - started) / -(-len(long) // CHUNK)


def test_a_long_prompt_beside_running_requests(live: Live, sizes: Sizes, record: Callable[..., None]) -> None:
    rng = random.Random(3)
    long = [prompt(sizes.interrupting, rng) for _ in range(4)]
    asyncio.run(_beside(live, long[0], rng))  # compiles what the measurement needs, as does the first prompt alone
    chunk = min(_seconds_of_a_chunk(live, each) for each in long[1:3])
    gaps = np.asarray(asyncio.run(_beside(live, long[3], rng)))
    record(
        "long prompt beside others", tokens=sizes.interrupting, chunk_ms=round(chunk * 1e3), gaps=len(gaps),
        median_ms=round(float(np.median(gaps)) * 1e3), p95_ms=round(float(np.percentile(gaps, 95)) * 1e3),
        most_ms=round(float(gaps.max()) * 1e3),
    )  # fmt: skip
    assert len(gaps) >= RUNNING * (sizes.interrupting // CHUNK - 1), "the others went on during every chunk"
    # The 95th percentile: a machine that other work shares stops everything now and then.
    assert np.percentile(gaps, 95) <= 2 * chunk
    live.wait_until_idle()
