"""Too few pages for all: requests give way and come back. And SIGTERM while they run: they are answered first."""

from __future__ import annotations

import asyncio
import random
import signal
from collections.abc import Callable
from pathlib import Path

import httpx

from tests.helpers.live import Live, serving, wait_for
from tests.helpers.soak_requests import TIMEOUT, Answer, ask, ask_alone, differ, prompt, stream
from tests.helpers.soak_sizes import Sizes

PAGES, TOKENS, NEW = 12, 16, 48
"""Pages of the cache, tokens of a page, tokens of an answer: some three requests fit at a time."""
FLAGS = (
    "--mesh",
    "tp=2,cp=2",
    "--kv-pages",
    str(PAGES),
    "--page-size",
    str(TOKENS),
    "--max-model-len",
    str(PAGES * TOKENS),
    "--max-running",
    "8",
    "--prefill-chunk",
    "64",
)


async def _press(live: Live, prompts: list[list[int]]) -> list[Answer]:
    async with httpx.AsyncClient(timeout=TIMEOUT) as client:
        return await asyncio.gather(*(ask(client, live, each, NEW) for each in prompts))


async def _drain(live: Live, prompts: list[list[int]]) -> int:
    """Ends the server while it answers.

    Returns: the requests that came after the signal and were refused.
    """
    async with httpx.AsyncClient(timeout=TIMEOUT) as client:
        running = [asyncio.ensure_future(stream(client, live, each, NEW)) for each in prompts]
        await asyncio.to_thread(wait_for, live.status, lambda status: status["running"] > 0, 60)
        live.process.send_signal(signal.SIGTERM)
        refused = 0
        for _ in range(100):
            await asyncio.sleep(0.05)
            try:
                answer = await client.get(f"{live.url}/ready")
                late = await client.post(
                    f"{live.url}/v1/completions", json={"model": live.model, "prompt": [5], "max_tokens": 1}
                )
            except httpx.TransportError:  # it listens no more
                refused += 1
                break
            if answer.status_code == 503:
                assert late.status_code == 503 and "retry-after" in late.headers
                refused += 1
                break
        await asyncio.gather(*running)  # each stream ends as it should
        return refused


def test_few_pages_and_a_drain(sizes: Sizes, tmp_path: Path, record: Callable[..., None]) -> None:
    rng = random.Random(4)
    with serving(tmp_path / "server.log", FLAGS) as live:
        prompts = [prompt(rng.randint(20, 100), rng) for _ in range(sizes.pressing)]
        together = asyncio.run(_press(live, prompts))
        status = live.wait_until_idle()
        for each, answer in zip(prompts, together, strict=True):
            alone = ask_alone(live, each, NEW, cache_salt="alone")
            assert differ(answer, alone) is None, differ(answer, alone)
        record("few pages", requests=len(prompts), pages=PAGES, preemptions=status["preemptions"])
        assert status["preemptions"] > 0, "the requests do not fit together, so some must have given way"
        live.wait_until_idle()
        refused = asyncio.run(_drain(live, prompts[:4]))
        assert live.process.wait(60) == 0
        record("drain", running=4, refused=refused)
        assert refused == 1
