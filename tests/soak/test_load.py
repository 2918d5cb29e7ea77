"""Many requests at a time, some cancelled, some invalid: every valid one is answered as if it were alone."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import math
import random
import statistics
import time
from collections.abc import Callable
from typing import Any

import httpx

from tests.helpers.live import Live
from tests.helpers.soak_requests import TIMEOUT, Answer, ask, ask_alone, body, differ, prompt
from tests.helpers.soak_sizes import Sizes

INVALID: list[dict[str, Any]] = [
    {"prompt": []},
    {"prompt": [99999999]},
    {"prompt": [-1]},
    {"max_tokens": 0},
    {"max_tokens": 10**9},
    {"temperature": -1},
    {"top_p": 0},
    {"nonsense": 1},
    {"prompt": "", "stop": [""] * 9},
    {"logit_bias": {"99999999": 1}},
]
"""Changes to a valid request."""
GROWTH = 128 << 20
"""Bytes that the server's memory may grow by over the run: the allocator's noise is less."""


@dataclasses.dataclass
class Mixed:
    """One request of the mixture."""

    prompt: list[int]
    max_tokens: int
    kind: str
    """valid, cancelled or invalid."""
    after: float
    """Seconds after which a cancelled one is given up."""
    change: dict[str, Any]
    answer: Answer | None = None
    status: int | None = None


def mixture(sizes: Sizes, rng: random.Random) -> list[Mixed]:
    kinds = ["cancelled"] * (sizes.requests // 5) + ["invalid"] * (sizes.requests // 10)
    kinds += ["valid"] * (sizes.requests - len(kinds))
    rng.shuffle(kinds)
    made = []
    for kind in kinds:
        length = round(math.exp(rng.uniform(0, math.log(sizes.longest))))  # as many from 4 to 40 as from 400 to 4000
        made.append(Mixed(prompt(length, rng), rng.randint(1, 24), kind, rng.expovariate(1.0), rng.choice(INVALID)))
    return made


async def send(client: httpx.AsyncClient, live: Live, mixed: Mixed) -> None:
    if mixed.kind == "valid":
        mixed.answer = await ask(client, live, mixed.prompt, mixed.max_tokens)
    elif mixed.kind == "invalid":
        wrong = body(live, mixed.prompt, mixed.max_tokens) | mixed.change
        mixed.status = (await client.post(f"{live.url}/v1/completions", json=wrong)).status_code
    else:
        with contextlib.suppress(TimeoutError):  # cancelling closes the connection
            await asyncio.wait_for(ask(client, live, mixed.prompt, 200), mixed.after)


async def send_all(live: Live, requests: list[Mixed], at_a_time: int) -> list[tuple[float, int]]:
    """Returns: (seconds, bytes of the server's memory), twice a second."""
    memory: list[tuple[float, int]] = []
    started, waiting = time.monotonic(), iter(requests)
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)

    async def worker(client: httpx.AsyncClient) -> None:
        for mixed in waiting:
            await send(client, live, mixed)

    async def watch() -> None:
        while True:
            memory.append((time.monotonic() - started, live.resident()))
            await asyncio.sleep(0.5)

    async with httpx.AsyncClient(timeout=TIMEOUT, limits=limits) as client:
        watching = asyncio.ensure_future(watch())
        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(at_a_time):
                    group.create_task(worker(client))
        finally:
            watching.cancel()
    return memory


def growth(memory: list[tuple[float, int]]) -> float:
    """Bytes over the whole run, at the slope between its second and its last quarter."""
    held = [size for _, size in memory]
    quarter = max(1, len(held) // 4)
    return 2 * (statistics.median(held[-quarter:]) - statistics.median(held[quarter : 2 * quarter] or held[:1]))


def test_every_valid_request_is_answered_as_if_alone(live: Live, sizes: Sizes, record: Callable[..., None]) -> None:
    rng = random.Random(0)
    # Programs that are compiled later would count as memory that grows.
    asyncio.run(
        send_all(
            live,
            mixture(dataclasses.replace(sizes, requests=min(sizes.requests, 2 * sizes.at_a_time)), rng),
            sizes.at_a_time,
        )
    )
    live.wait_until_idle()
    requests = mixture(sizes, rng)
    started = time.monotonic()
    memory = asyncio.run(send_all(live, requests, sizes.at_a_time))
    took = time.monotonic() - started
    live.wait_until_idle()
    valid = [mixed for mixed in requests if mixed.kind == "valid"]
    wrong, ties = [], 0
    for i, mixed in enumerate(valid):
        alone = ask_alone(live, mixed.prompt, mixed.max_tokens, cache_salt=f"alone {i}")  # computed anew
        assert mixed.answer is not None and alone.cached == 0
        found = differ(mixed.answer, alone)
        ties += found is None and mixed.answer.tokens != alone.tokens
        wrong += [f"prompt of {len(mixed.prompt)} tokens: {found}"] if found else []
    record(
        "mixed load",
        requests=len(requests),
        valid=len(valid),
        seconds=round(took, 1),
        ties=ties,
        wrong=len(wrong),
        grown_mb=round(growth(memory) / 2**20, 1),
        resident_mb=round(memory[-1][1] / 2**20),
    )
    assert not wrong, wrong
    refused = {mixed.status for mixed in requests if mixed.kind == "invalid"}
    assert refused == {400}
    assert growth(memory) < GROWTH
    live.wait_until_idle()
