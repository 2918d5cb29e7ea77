"""Host time of the engine in a decode step: scheduling, requests, results and text, without a model."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from jax_mla_cp.batch.step_request import StepRequest
from jax_mla_cp.bench.engine_run import all_decoding, run_requests
from jax_mla_cp.engine.engine import Engine
from jax_mla_cp.engine.observer import StepReport
from jax_mla_cp.engine.step_runner import StepRunner
from jax_mla_cp.mesh import MeshShape
from jax_mla_cp.serve.status import ServerInfo, Telemetry
from jax_mla_cp.step.results import RunnerOutput, SampledToken, StepResult
from jax_mla_cp.step.synchronous_runner import SynchronousRunner
from jax_mla_cp.tokenizer import Tokenizer


class NullRunner(SynchronousRunner):
    """A runner whose steps cost nothing and always sample the same token.

    Implements `jax_mla_cp.engine.step_runner.StepRunner`.
    """

    draft_tokens = 0
    compiling = None
    runs_ahead = True

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

    def check(self, request: StepRequest) -> None:
        """Accepts every request."""

    def step(self, groups: Sequence[Sequence[StepRequest]]) -> RunnerOutput:
        idle = np.zeros(self.cp, np.int64)
        results = [[self._sampled if r.sampling else StepResult([], []) for r in requests] for requests in groups]
        return RunnerOutput(results, idle, idle)

    def reset(self) -> None:
        """Does nothing: there is no cache."""


class _RecordingTelemetry(Telemetry):
    """The server's observer, whose time counts too, with the reports of all steps."""

    def __init__(self) -> None:
        super().__init__(ServerInfo("none", 1, chat=False, mesh=MeshShape(), facts={}))
        self.reports: list[StepReport] = []

    def step(self, report: StepReport) -> None:
        super().step(report)
        self.reports.append(report)


def host_seconds(
    runner: StepRunner, *, requests: int, steps: int, prompt_tokens: int = 32, tokenizer: Tokenizer | None = None
) -> list[float]:
    """Measures the engine's own time per decode step.

    Args:
      runner: a stand-in (`NullRunner`) or a real runner, whose own time does not count.
      requests: the number that the runner can run, over all dp groups, each with `prompt_tokens + steps` tokens.
      steps: tokens that each request generates.
      tokenizer: detokenizes the output; None: no text is made.

    Returns: seconds of each step in which all requests decode and none is prefilled; about `steps` of them.

    Raises:
      ValueError: a request was refused or failed.
    """
    observer = _RecordingTelemetry()
    prompts = [[i % 64, *([0] * (prompt_tokens - 1))] for i in range(requests)]
    run_requests(Engine(runner, observer=observer), prompts, steps, tokenizer)
    return [report.host_seconds for report in all_decoding(observer.reports, requests)]
