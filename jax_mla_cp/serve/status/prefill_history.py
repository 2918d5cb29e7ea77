"""Prefill history: the tokens of recent prompts that each cp rank computed, step by step."""

from __future__ import annotations

import collections
import dataclasses
import functools
import threading
from collections.abc import Iterable

import numpy as np

from jax_mla_cp.batch.zigzag import plan
from jax_mla_cp.engine.observer import PrefillReport
from jax_mla_cp.serve.status.schemas import Chunk, Prompt, PromptStep

_MAX_PROMPTS = 6
_MAX_STEPS = 24  # per prompt: more would not be visible


@functools.lru_cache(maxsize=1024)  # the status page asks for the same chunks every second
def zigzag_chunks(cached: int, new: int, cp: int) -> list[Chunk]:
    """A prompt's chunks in one step, as `jax_mla_cp.batch.zigzag` assigns them to ranks, in prompt order.

    >>> [(c.rank, c.start, c.end) for c in zigzag_chunks(100, 8, cp=2)]
    [(0, 100, 102), (1, 102, 104), (1, 104, 106), (0, 106, 108)]
    >>> zigzag_chunks(0, 3, cp=2)
    [Chunk(rank=None, start=0, end=3)]
    """
    if cp > 1 and new < 2 * cp:  # the rank depends on the other requests of the step
        return [Chunk(rank=None, start=cached, end=cached + new)]
    p = plan([new], [cached], cp=cp)
    return [
        Chunk(rank=int(p.row_rank[i]), start=int(p.row_kv_len[i] - p.row_len[i]), end=int(p.row_kv_len[i]))
        for i in np.argsort(p.row_kv_len)
    ]


@dataclasses.dataclass
class _History:
    reused: int
    total: int = 0
    done: int = 0
    steps: collections.deque[tuple[int, int]] = dataclasses.field(
        default_factory=lambda: collections.deque(maxlen=_MAX_STEPS)
    )


class PrefillHistory:
    """The prompts of the last prefill steps. Thread-safe: the engine's thread never waits for more than a copy."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._prompts: collections.OrderedDict[str, _History] = collections.OrderedDict()
        self._active: set[str] = set()

    def step(self, prompts: Iterable[PrefillReport]) -> None:
        """Records the prompts of a step."""
        with self._lock:
            self._active = set()
            for prompt in prompts:
                history = self._prompts.get(prompt.id)
                if history is None or history.done != prompt.cached:  # new, or restarted after a preemption
                    history = self._prompts[prompt.id] = _History(reused=prompt.cached)
                history.total, history.done = prompt.total, prompt.cached + prompt.new
                history.steps.append((prompt.cached, prompt.new))
                self._prompts.move_to_end(prompt.id)
                self._active.add(prompt.id)
            while len(self._prompts) > _MAX_PROMPTS:
                self._prompts.popitem(last=False)

    def latest(self, cp: int) -> list[Prompt]:
        """The recorded prompts, latest first."""
        with self._lock:
            active = self._active
            prompts = [(id, dataclasses.replace(h, steps=h.steps.copy())) for id, h in reversed(self._prompts.items())]
        return [
            Prompt(
                id=id,
                total=history.total,
                done=history.done,
                reused=history.reused,
                active=id in active,
                steps=[PromptStep(start=start, chunks=zigzag_chunks(start, new, cp)) for start, new in history.steps],
            )
            for id, history in prompts
        ]
