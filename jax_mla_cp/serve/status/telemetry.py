"""`Telemetry`: the engine's observer, which collects the data of /metrics, /status and the status page."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence

from jax_mla_cp.distributed.leader import ProcessStatus
from jax_mla_cp.engine import CompileProgress, Engine
from jax_mla_cp.engine.observer import Observer, RequestReport, StepReport
from jax_mla_cp.serve.metrics import Metrics, balance
from jax_mla_cp.serve.status.prefill_history import PrefillHistory
from jax_mla_cp.serve.status.schemas import (
    Compiling,
    Latency,
    MeshSize,
    Model,
    Pages,
    Percentiles,
    Prefill,
    Process,
    Speculation,
    Status,
)
from jax_mla_cp.serve.status.server_info import ServerInfo
from jax_mla_cp.serve.status.sliding_window import LatencyWindow, RateWindow


class Telemetry(Observer):
    """Observes an engine. The observer's methods run on the engine's thread; `status` may be called from any thread.

    Args:
      processes: tells of the processes that execute the engine's steps; None: this process is alone.
    """

    def __init__(self, info: ServerInfo, processes: Callable[[], Sequence[ProcessStatus]] | None = None):
        self._info, self._processes = info, processes
        mesh = {"dp": str(info.mesh.dp), "cp": str(info.mesh.cp), "tp": str(info.mesh.tp)}
        self.metrics = Metrics(info.model_name, info.max_model_len, mesh | info.facts)
        if processes is not None:
            self.metrics.add_processes(processes)
        self._started = time.monotonic()
        self._ttft, self._itl, self._step_time = LatencyWindow(), LatencyWindow(), LatencyWindow()
        self._prompt_rate, self._token_rate = RateWindow(), RateWindow()
        self._prompts = PrefillHistory()
        self._prefill: tuple[float, StepReport] | None = None

    def step(self, report: StepReport) -> None:
        self.metrics.step(report)
        self._step_time.add(report.seconds)
        if report.prefill_tokens:
            self._prompt_rate.add(report.prefill_tokens)
            self._prompts.step(report.prefills)
            self._prefill = time.monotonic(), report

    def first_token(self, seconds_since_arrival: float) -> None:
        self.metrics.first_token(seconds_since_arrival)
        self._ttft.add(seconds_since_arrival)
        self._token_rate.add(1)

    def token(self, seconds_since_last: float) -> None:
        self.metrics.token(seconds_since_last)
        self._itl.add(seconds_since_last)
        self._token_rate.add(1)

    def started(self, queue_seconds: float) -> None:
        self.metrics.started(queue_seconds)

    def finished(self, report: RequestReport) -> None:
        self.metrics.finished(report)

    def status(self, engine: Engine) -> Status:
        """The current status."""
        now, info, unhealthy = engine.status(), self._info, engine.unhealthy_reason
        return Status(
            healthy=unhealthy is None,
            reason=unhealthy,
            uptime=time.monotonic() - self._started,
            compiling=_compiling(now.compiling),
            model=Model(name=info.model_name, max_model_len=info.max_model_len, chat=info.chat, facts=info.facts),
            mesh=MeshSize(dp=info.mesh.dp, cp=info.mesh.cp, tp=info.mesh.tp),
            processes=None
            if self._processes is None
            else [Process(**dataclasses.asdict(process)) for process in self._processes()],
            running=now.running,
            waiting=now.waiting,
            steps=now.steps,
            preemptions=now.preemptions,
            pages=Pages(total=now.pages_total, used=now.pages_used, cached=now.pages_cached, free=now.pages_free),
            prefix_queries=now.prefix_queries,
            prefix_hits=now.prefix_hits,
            speculation=None
            if now.speculation is None
            else Speculation(drafted=now.speculation.num_drafts, accepted=now.speculation.num_accepted),
            prefill=self._last_prefill(),
            ttft=_latency(self._ttft),
            itl=_latency(self._itl),
            step_time=_latency(self._step_time),
            prompt_rate=self._prompt_rate.series(),
            token_rate=self._token_rate.series(),
        )

    def _last_prefill(self) -> Prefill | None:
        if self._prefill is None:
            return None
        at, report = self._prefill
        return Prefill(
            age=time.monotonic() - at,
            seconds=report.seconds,
            tokens=list(report.rank_tokens),
            pairs=list(report.rank_pairs),
            balance=balance(report.rank_pairs),
            prompts=self._prompts.latest(self._info.mesh.cp),
        )


def _compiling(progress: CompileProgress | None) -> Compiling | None:
    if progress is None:
        return None
    seconds = time.monotonic() - progress.since
    return Compiling(done=progress.done, total=progress.total, tokens=progress.tokens, seconds=seconds)


def _latency(window: LatencyWindow) -> Latency:
    summary = window.summary()
    return Latency(
        summary=None if summary is None else Percentiles(p50=summary[0], p99=summary[1]), series=window.series()
    )
