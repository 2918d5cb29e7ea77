"""How long the engine's own part of a step takes: schedule, works, outcomes, text; without a model."""

from __future__ import annotations

import threading
from collections.abc import Sequence

import numpy as np

from jax_mla_cp.batch.step_request import SamplingParams, StepRequest
from jax_mla_cp.engine.engine import Engine
from jax_mla_cp.engine.observer import StepReport
from jax_mla_cp.engine.request import Event, Failed, Finished, Request
from jax_mla_cp.engine.steps import Steps
from jax_mla_cp.engine.text import TextStream
from jax_mla_cp.mesh import MeshShape
from jax_mla_cp.serve.status import ServerInfo, Telemetry
from jax_mla_cp.step.results import SampledToken, StepResult
from jax_mla_cp.tokenizer import Tokenizer


class NoModel:
    """Steps that cost nothing: each samples the same token after whatever it is given.

    Implements `jax_mla_cp.engine.steps.Steps`.
    """

    draft_tokens = 0
    compiling = None

    def __init__(
        self,
        *,
        max_running: int,
        prefill_chunk: int,
        pages_per_group: int,
        page_size: int = 64,
        dp: int = 1,
        cp: int = 1,
        token: int = 0,
    ):
        self.max_running, self.prefill_chunk = max_running, prefill_chunk
        self.pages_per_group, self.page_size, self.dp, self.cp = pages_per_group, page_size, dp, cp
        top = np.arange(20, dtype=np.int32), np.linspace(-1, -9, 20, dtype=np.float32)
        self._sampled = StepResult([SampledToken(token, -1.0, *top)], [])

    def check(self, work: StepRequest) -> None:
        """Nothing is wrong with any."""

    def step(self, work: Sequence[Sequence[StepRequest]]) -> list[list[StepResult]]:
        return [[self._sampled if w.sampling else StepResult([], []) for w in works] for works in work]

    def reset(self) -> None:
        """There is nothing to lose."""


class _Steps(Telemetry):
    """The server's own observer, whose time counts too; and the reports of all steps."""

    def __init__(self) -> None:
        super().__init__(ServerInfo("none", 1, chat=False, mesh=MeshShape(), facts={}))
        self.reports: list[StepReport] = []

    def step(self, report: StepReport) -> None:
        super().step(report)
        self.reports.append(report)


def host_seconds(
    runner: Steps, *, requests: int, steps: int, prompt_tokens: int = 32, tokenizer: Tokenizer | None = None
) -> list[float]:
    """The engine's own seconds in each step in which `requests` requests decode: about `steps` of them.

    Args:
      runner: a stand-in (`NoModel`), or a real one; its own time does not count.
      requests: as many as it can run, over all dp groups, with room for `prompt_tokens + steps` tokens each.
      tokenizer: makes text of the tokens; None: there is no text.

    Raises:
      ValueError: a request failed or could not be.
    """
    observer, done, failed = _Steps(), threading.Semaphore(0), []

    def emit(event: Event) -> None:
        if isinstance(event, Failed):
            failed.append(event.message)
        if isinstance(event, Failed | Finished):
            done.release()

    engine = Engine(runner, observer=observer)
    engine.submit_all(
        [
            Request(
                [i % 64, *([0] * (prompt_tokens - 1))],
                steps,
                SamplingParams(),
                frozenset(),
                TextStream(tokenizer),
                emit,
            )
            for i in range(requests)
        ]
    )
    engine.start()
    for _ in range(requests):
        done.acquire()
    engine.stop()
    if failed:
        raise ValueError(f"a request failed: {failed[0]}")
    return [r.host_seconds for r in observer.reports if r.decode_tokens == requests and not r.prefill_tokens]
