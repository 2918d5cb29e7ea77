"""Prometheus metrics with vLLM's names, prefixed `jax_mla_cp:` instead of `vllm:`, so that its dashboards work.

Events are counted as the engine reports them (`Metrics` is an `engine.observer.Observer`); the current state (queue, pages)
is read from the engine at each scrape. Buckets are vLLM's (vllm/v1/metrics/loggers.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4, generate_latest
from prometheus_client.openmetrics import exposition as openmetrics

from jax_mla_cp.distributed.leader import ProcessStatus
from jax_mla_cp.engine import EngineStatus
from jax_mla_cp.engine.observer import Observer, RequestReport, StepReport

PREFIX = "jax_mla_cp:"

_OPEN_METRICS = "application/openmetrics-text; version=1.0.0; charset=utf-8"

_TTFT = (
    0.001,
    0.005,
    0.01,
    0.02,
    0.04,
    0.06,
    0.08,
    0.1,
    0.25,
    0.5,
    0.75,
    1.0,
    2.5,
    5.0,
    7.5,
    10.0,
    20.0,
    40.0,
    80.0,
    160.0,
    640.0,
    2560.0,
)
_BETWEEN_TOKENS = (
    0.01,
    0.025,
    0.05,
    0.075,
    0.1,
    0.15,
    0.2,
    0.3,
    0.4,
    0.5,
    0.75,
    1.0,
    2.5,
    5.0,
    7.5,
    10.0,
    20.0,
    40.0,
    80.0,
)
_REQUEST = (
    0.3,
    0.5,
    0.8,
    1.0,
    1.5,
    2.0,
    2.5,
    5.0,
    10.0,
    15.0,
    20.0,
    30.0,
    40.0,
    50.0,
    60.0,
    120.0,
    240.0,
    480.0,
    960.0,
    1920.0,
    7680.0,
)
_HOST = (0.0001, 0.00025, 0.0005, 0.001, 0.002, 0.004, 0.008, 0.016, 0.032, 0.064, 0.25, 1.0)
_BALANCE = (0.5, 0.6, 0.7, 0.8, 0.9, 0.92, 0.94, 0.96, 0.97, 0.98, 0.99, 0.995, 1.0)


def balance(pairs: Iterable[int]) -> float:
    """Mean divided by maximum of the ranks' query-key pairs: the share of the time that ranks compute rather than wait for
    the slowest. 1 is perfect balance.

    >>> balance([6, 6, 6, 8])
    0.8125
    """
    counts = list(pairs)
    most = max(counts, default=0)
    return sum(counts) / (len(counts) * most) if most else 1.0


def buckets_1_2_5(largest: int) -> list[int]:
    """Buckets 1, 2, 5, 10, ... up to `largest`, as vLLM's `build_1_2_5_buckets`, for token counts.

    >>> buckets_1_2_5(100)
    [1, 2, 5, 10, 20, 50, 100]
    """
    return [step * 10**e for e in range(len(str(largest))) for step in (1, 2, 5) if step * 10**e <= largest]


class Metrics(Observer):
    """One server's metrics, in their own registry. The observer's methods run on the engine's thread.

    Args:
      model_name: label of every metric.
      info: constant labels of `engine_info`; names of letters, digits and _.
    """

    def __init__(self, model_name: str, max_model_len: int, info: dict[str, str]):
        self._registry = CollectorRegistry()
        self._current = _WithoutCreated(self._registry)
        self._model = model_name
        self._prompt_tokens = self._counter(
            "prompt_tokens", "Prompt tokens computed, without those reused from the prefix cache."
        )
        self._generation_tokens = self._counter("generation_tokens", "Generated tokens.")
        self._prefill_steps = self._counter("cp_prefill_steps", "Steps that computed prompt tokens.")
        self._ttft = self._histogram("time_to_first_token_seconds", "Time from arrival to the first token.", _TTFT)
        self._itl = self._histogram(
            "inter_token_latency_seconds", "Time between successive tokens of a request.", _BETWEEN_TOKENS
        )
        self._queue = self._histogram("request_queue_time_seconds", "Time in the waiting queue.", _REQUEST)
        self._prefill = self._histogram(
            "request_prefill_time_seconds", "Time from the first step to the first token.", _REQUEST
        )
        self._decode = self._histogram(
            "request_decode_time_seconds", "Time from the first token to the last.", _REQUEST
        )
        self._e2e = self._histogram("e2e_request_latency_seconds", "Time from arrival to the last token.", _REQUEST)
        lengths = buckets_1_2_5(max_model_len)
        self._request_prompt = self._histogram("request_prompt_tokens", "Prompt tokens per request.", lengths)
        self._request_output = self._histogram("request_generation_tokens", "Generated tokens per request.", lengths)
        self._steps = Counter(
            PREFIX + "engine_steps",
            "Steps; overlapped: dispatched before the step before had been read.",
            ("model_name", "mode"),
            registry=self._registry,
        )
        for mode in ("overlapped", "synchronous"):
            self._steps.labels(model_name, mode)
        self._balance = self._histogram(
            "cp_prefill_balance",
            "Mean divided by maximum of the cp ranks' query-key pairs in a prefill step; 1 is perfect balance.",
            _BALANCE,
        )
        self._step_seconds = self._histogram("engine_step_seconds", "Duration of a step, host and devices.", _TTFT)
        self._host_seconds = self._histogram("engine_step_host_seconds", "Host time of a step.", _HOST)
        self._success = Counter(
            PREFIX + "request_success",
            "Finished requests by finish reason.",
            ("model_name", "finished_reason"),
            registry=self._registry,
        )
        self._failure = Counter(
            PREFIX + "request_failure",
            "Failed requests by kind of failure.",
            ("model_name", "kind"),
            registry=self._registry,
        )
        info = {"model_name": self._model} | info
        Gauge(
            PREFIX + "engine_info",
            "Versions and configuration, as labels; always 1.",
            tuple(info),
            registry=self._registry,
        ).labels(**info).set(1)

    def _counter(self, name: str, text: str) -> Counter:
        return Counter(PREFIX + name, text, ("model_name",), registry=self._registry).labels(self._model)

    def _histogram(self, name: str, text: str, buckets: Iterable[float]) -> Histogram:
        made = Histogram(PREFIX + name, text, ("model_name",), registry=self._registry, buckets=tuple(buckets))
        return made.labels(self._model)

    # Reported by the engine.

    def step(self, report: StepReport) -> None:
        self._step_seconds.observe(report.seconds)
        self._host_seconds.observe(report.host_seconds)
        self._steps.labels(self._model, "overlapped" if report.overlapped else "synchronous").inc()
        if report.prefill_tokens:
            self._prompt_tokens.inc(report.prefill_tokens)
            self._prefill_steps.inc()
            self._balance.observe(balance(report.rank_pairs))

    def first_token(self, seconds_since_arrival: float) -> None:
        self._generation_tokens.inc()
        self._ttft.observe(seconds_since_arrival)

    def token(self, seconds_since_last: float) -> None:
        self._generation_tokens.inc()
        self._itl.observe(seconds_since_last)

    def started(self, queue_seconds: float) -> None:
        self._queue.observe(queue_seconds)

    def finished(self, report: RequestReport) -> None:
        if report.reason not in ("stop", "length", "abort"):
            self._failure.labels(self._model, report.reason).inc()
            return
        self._success.labels(self._model, report.reason).inc()
        if report.reason == "abort":  # its times depend on the client, not on the server
            return
        self._e2e.observe(report.e2e_seconds)
        self._request_prompt.observe(report.prompt_tokens)
        self._request_output.observe(report.output_tokens)
        self._prefill.observe(report.prefill_seconds)
        self._decode.observe(max(0.0, report.e2e_seconds - report.queue_seconds - report.prefill_seconds))

    # Read at each scrape.

    def add_status(self, status: Callable[[], EngineStatus]) -> None:
        """Adds the gauges and counters of the engine's status; `status` is called at every scrape."""
        self._registry.register(_StatusCollector(self._model, status))

    def add_processes(self, processes: Callable[[], Sequence[ProcessStatus]]) -> None:
        """Adds the gauges of several processes; `processes` is called at every scrape."""
        self._registry.register(_ProcessCollector(self._model, processes))

    def render(self, accept: str) -> tuple[bytes, str]:
        """Returns (body, content type): OpenMetrics if the Accept header asks for it, otherwise Prometheus's text format.

        prometheus_client's `choose_encoder` is not used: its OpenMetrics replaces the colon by `_` in the names of samples,
        but not of families, and it raises for a version that is not a number.
        """
        if "application/openmetrics-text" in accept:
            return openmetrics.generate_latest(self._current, escaping=openmetrics.ALLOWUTF8), _OPEN_METRICS
        return generate_latest(self._current), CONTENT_TYPE_PLAIN_0_0_4


class _WithoutCreated:
    """Drops the `_created` samples, an extra series per metric that nobody plots."""

    def __init__(self, registry: CollectorRegistry):
        self._registry = registry

    def collect(self) -> Iterable[Metric]:
        for metric in self._registry.collect():
            metric.samples = [sample for sample in metric.samples if not sample.name.endswith("_created")]
            yield metric


class _StatusCollector:
    def __init__(self, model: str, status: Callable[[], EngineStatus]):
        self._model = model
        self._status = status

    def collect(self) -> Iterable[Metric]:
        now = self._status()
        yield self._gauge("num_requests_running", "Running requests.", now.running)
        yield self._gauge("num_requests_waiting", "Requests in the waiting queue.", now.waiting)
        yield self._gauge(
            "kv_cache_usage_perc",
            "Share of the KV cache pages in use by running requests, 0 to 1.",
            now.pages_used / now.pages_total,
        )
        yield self._counter("prefix_cache_queries", "Prompt tokens looked up in the prefix cache.", now.prefix_queries)
        yield self._counter("prefix_cache_hits", "Prompt tokens found in the prefix cache.", now.prefix_hits)
        yield self._counter("num_preemptions", "Preempted requests.", now.preemptions)
        if now.speculation is not None:
            drafted, accepted = now.speculation.num_drafts, now.speculation.num_accepted
            yield self._counter("spec_decode_num_draft_tokens", "Draft tokens verified.", drafted)
            yield self._counter("spec_decode_num_accepted_tokens", "Draft tokens accepted.", accepted)

    def _gauge(self, name: str, text: str, value: float) -> Metric:
        family = GaugeMetricFamily(PREFIX + name, text, labels=("model_name",))
        family.add_metric((self._model,), value)
        return family

    def _counter(self, name: str, text: str, value: float) -> Metric:
        family = CounterMetricFamily(PREFIX + name, text, labels=("model_name",))
        family.add_metric((self._model,), value)
        return family


class _ProcessCollector:
    def __init__(self, model: str, processes: Callable[[], Sequence[ProcessStatus]]):
        self._model = model
        self._processes = processes

    def collect(self) -> Iterable[Metric]:
        now = self._processes()
        yield self._gauge(
            "process_heartbeat_age_seconds",
            "Time since a process's last message; 0 for process 0.",
            [(p, p.heartbeat_age) for p in now],
        )
        yield self._gauge("process_step", "A process's last step.", [(p, p.step) for p in now])
        yield self._gauge(
            "process_step_seconds", "Duration of a process's last step.", [(p, p.step_seconds) for p in now]
        )

    def _gauge(self, name: str, text: str, values: Iterable[tuple[ProcessStatus, float]]) -> Metric:
        family = GaugeMetricFamily(PREFIX + name, text, labels=("model_name", "process", "host"))
        for process, value in values:
            family.add_metric((self._model, str(process.process), process.host), value)
        return family
