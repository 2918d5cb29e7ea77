"""`Telemetry`: the engine's observer, which keeps what /metrics, /status and the page show."""

from __future__ import annotations

import time

from jax_mla_cp.engine import Engine
from jax_mla_cp.engine.observer import Observer, RequestReport, StepReport
from jax_mla_cp.serve.metrics import Metrics, balance
from jax_mla_cp.serve.status.about import About
from jax_mla_cp.serve.status.prompts import Prompts
from jax_mla_cp.serve.status.recent import Latencies, Rates
from jax_mla_cp.serve.status.schemas import Latency, MeshSize, Model, Pages, Percentiles, Prefill, Speculation, Status


class Telemetry(Observer):
    """Observes an engine. Its thread calls the observer's methods; anybody may call the others."""

    def __init__(self, about: About):
        self.about = about
        mesh = {axis: str(getattr(about.mesh, axis)) for axis in ("dp", "cp", "tp")}
        self.metrics = Metrics(about.model_name, about.max_model_len, mesh | about.facts)
        self._started = time.monotonic()
        self._ttft, self._itl, self._step_time = Latencies(), Latencies(), Latencies()
        self._prompt_rate, self._token_rate = Rates(), Rates()
        self._prompts = Prompts()
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
        """All of it, as of now."""
        now, about, unhealthy = engine.status(), self.about, engine.unhealthy_reason
        return Status(
            healthy=unhealthy is None,
            reason=unhealthy,
            uptime=time.monotonic() - self._started,
            model=Model(name=about.model_name, max_model_len=about.max_model_len, chat=about.chat, facts=about.facts),
            mesh=MeshSize(dp=about.mesh.dp, cp=about.mesh.cp, tp=about.mesh.tp),
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
            prompts=self._prompts.show(self.about.mesh.cp),
        )


def _latency(recent: Latencies) -> Latency:
    summary = recent.summary()
    return Latency(
        summary=None if summary is None else Percentiles(p50=summary[0], p99=summary[1]), series=recent.series()
    )
