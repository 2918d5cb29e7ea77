"""Which tokens of recent prompts each cp rank computed: the zigzag, step after step."""

from __future__ import annotations

import collections
import dataclasses
import functools
import threading
from collections.abc import Iterable

import numpy as np

from jax_mla_cp.batch.zigzag import plan
from jax_mla_cp.engine.observer import Prefilled
from jax_mla_cp.serve.status.schemas import Chunk, Prompt, PromptStep

_PROMPTS = 6
_STEPS = 24  # of a prompt: what a picture can show


@functools.lru_cache(maxsize=1024)  # asked again every second
def chunks(cached: int, new: int, cp: int) -> list[Chunk]:
    """The step's pieces of a prompt by `jax_mla_cp.batch.zigzag`, in the order of the prompt.

    >>> [(c.rank, c.start, c.end) for c in chunks(100, 8, cp=2)]
    [(0, 100, 102), (1, 102, 104), (1, 104, 106), (0, 106, 108)]
    >>> chunks(0, 3, cp=2)
    [Chunk(rank=None, start=0, end=3)]
    """
    if cp > 1 and new < 2 * cp:  # which rank depends on the step's other requests
        return [Chunk(rank=None, start=cached, end=cached + new)]
    p = plan([new], [cached], cp=cp)
    return [
        Chunk(rank=int(p.row_rank[i]), start=int(p.row_kv_len[i] - p.row_len[i]), end=int(p.row_kv_len[i]))
        for i in np.argsort(p.row_kv_len)
    ]


@dataclasses.dataclass
class _Seen:
    reused: int
    total: int = 0
    done: int = 0
    steps: collections.deque[tuple[int, int]] = dataclasses.field(
        default_factory=lambda: collections.deque(maxlen=_STEPS)
    )


class Prompts:
    """The prompts of the last prefill steps. Thread-safe: the engine's thread never waits for more than a copy."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._seen: collections.OrderedDict[str, _Seen] = collections.OrderedDict()
        self._active: set[str] = set()

    def step(self, prompts: Iterable[Prefilled]) -> None:
        """Takes the prompts of a step."""
        with self._lock:
            self._active = set()
            for prompt in prompts:
                seen = self._seen.get(prompt.id)
                if seen is None or seen.done != prompt.cached:  # new here, or preempted and begun again
                    seen = self._seen[prompt.id] = _Seen(reused=prompt.cached)
                seen.total, seen.done = prompt.total, prompt.cached + prompt.new
                seen.steps.append((prompt.cached, prompt.new))
                self._seen.move_to_end(prompt.id)
                self._active.add(prompt.id)
            while len(self._seen) > _PROMPTS:
                self._seen.popitem(last=False)

    def show(self, cp: int) -> list[Prompt]:
        """The latest first."""
        with self._lock:
            active = self._active
            seen = [(name, dataclasses.replace(s, steps=s.steps.copy())) for name, s in reversed(self._seen.items())]
        return [
            Prompt(
                id=name,
                total=s.total,
                done=s.done,
                reused=s.reused,
                active=name in active,
                steps=[PromptStep(start=start, chunks=chunks(start, new, cp)) for start, new in s.steps],
            )
            for name, s in seen
        ]
