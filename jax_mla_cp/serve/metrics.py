"""Prometheus metrics under vLLM's names, with `jax_mla_cp:` for its `vllm:`: its dashboards need no other change.

What happens is counted as the engine tells it (`Metrics` is an `engine.observer.Observer`); what is true at a moment
(queue, pages) is asked of the engine when somebody scrapes. Buckets are vLLM's (vllm/v1/metrics/loggers.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4, generate_latest
from prometheus_client.openmetrics import exposition as openmetrics

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
    """Mean over maximum of the ranks' query-key pairs: the share of the time that a rank works rather than waits for the
    slowest; 1 is perfect.

    >>> balance([6, 6, 6, 8])
    0.8125
    """
    counts = list(pairs)
    most = max(counts, default=0)
    return sum(counts) / (len(counts) * most) if most else 1.0


def steps_1_2_5(largest: int) -> list[int]:
    """1, 2, 5, 10, ... up to `largest`, vLLM's buckets for numbers of tokens.

    >>> steps_1_2_5(100)
    [1, 2, 5, 10, 20, 50, 100]
    """
    return [step * 10**e for e in range(len(str(largest))) for step in (1, 2, 5) if step * 10**e <= largest]


class Metrics(Observer):
    """One server's metrics in a registry of their own. The observer's methods run on the engine's thread.

    Args:
      model_name: a label of every metric.
      info: what never changes, the labels of `engine_info`: letters, digits and _ in their names.
    """

    def __init__(self, model_name: str, max_model_len: int, info: dict[str, str]):
        self._registry = CollectorRegistry()
        self._current = _WithoutCreated(self._registry)
        self._model = model_name
        self._prompt_tokens = self._counter(
            "prompt_tokens", "Prompt tokens computed; those reused from the cache are not."
        )
        self._generation_tokens = self._counter("generation_tokens", "Tokens sampled.")
        self._prefill_steps = self._counter("cp_prefill_steps", "Steps that computed prompt tokens.")
        self._ttft = self._histogram(
            "time_to_first_token_seconds", "From a request's arrival to its first token.", _TTFT
        )
        self._itl = self._histogram("inter_token_latency_seconds", "Between a request's tokens.", _BETWEEN_TOKENS)
        self._queue = self._histogram("request_queue_time_seconds", "From arrival to the first step.", _REQUEST)
        self._prefill = self._histogram("request_prefill_time_seconds", "From first step to first token.", _REQUEST)
        self._decode = self._histogram("request_decode_time_seconds", "From first token to the end.", _REQUEST)
        self._e2e = self._histogram("e2e_request_latency_seconds", "From arrival to the end.", _REQUEST)
        lengths = steps_1_2_5(max_model_len)
        self._request_prompt = self._histogram("request_prompt_tokens", "Tokens of a request's prompt.", lengths)
        self._request_output = self._histogram("request_generation_tokens", "Tokens that a request got.", lengths)
        self._balance = self._histogram(
            "cp_prefill_balance", "Mean over maximum of the cp ranks' query-key pairs in a prefill step.", _BALANCE
        )
        self._step_seconds = self._histogram("engine_step_seconds", "A step, on host and devices.", _TTFT)
        self._host_seconds = self._histogram("engine_step_host_seconds", "The host's part of a step.", _HOST)
        self._success = Counter(
            PREFIX + "request_success",
            "Requests that ended, by why.",
            ("model_name", "finished_reason"),
            registry=self._registry,
        )
        self._failure = Counter(
            PREFIX + "request_failure", "Requests that failed, by why.", ("model_name", "kind"), registry=self._registry
        )
        info = {"model_name": self._model} | info
        Gauge(PREFIX + "engine_info", "What runs, in labels; always 1.", tuple(info), registry=self._registry).labels(
            **info
        ).set(1)

    def _counter(self, name: str, text: str) -> Counter:
        return Counter(PREFIX + name, text, ("model_name",), registry=self._registry).labels(self._model)

    def _histogram(self, name: str, text: str, buckets: Iterable[float]) -> Histogram:
        made = Histogram(PREFIX + name, text, ("model_name",), registry=self._registry, buckets=tuple(buckets))
        return made.labels(self._model)

    # What the engine tells.

    def step(self, report: StepReport) -> None:
        self._step_seconds.observe(report.seconds)
        self._host_seconds.observe(report.host_seconds)
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
        if report.reason == "abort":  # its times say when a client lost interest, nothing of the server
            return
        self._e2e.observe(report.e2e_seconds)
        self._request_prompt.observe(report.prompt_tokens)
        self._request_output.observe(report.output_tokens)
        self._prefill.observe(report.prefill_seconds)
        self._decode.observe(max(0.0, report.e2e_seconds - report.queue_seconds - report.prefill_seconds))

    # What is asked.

    def watch(self, status: Callable[[], EngineStatus]) -> None:
        """Adds what `status` says, called at every scrape."""
        self._registry.register(_StatusCollector(self._model, status))

    def render(self, accept: str) -> tuple[bytes, str]:
        """(body, content type) in the format that an Accept header asks for: OpenMetrics, else Prometheus's text.

        Not by prometheus_client's `choose_encoder`: its OpenMetrics has `_` for the colon in the samples' names, though not
        in the families', and it raises on a version that is no number.
        """
        if "application/openmetrics-text" in accept:
            return openmetrics.generate_latest(self._current, escaping=openmetrics.ALLOWUTF8), _OPEN_METRICS
        return generate_latest(self._current), CONTENT_TYPE_PLAIN_0_0_4


class _WithoutCreated:
    """Without the times at which metrics were made, a series more for each, which nobody plots."""

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
        yield self._gauge("num_requests_running", "Requests that run.", now.running)
        yield self._gauge("num_requests_waiting", "Requests that wait for pages or a place.", now.waiting)
        yield self._gauge(
            "kv_cache_usage_perc", "Pages that running requests hold, 1 is all.", now.pages_used / now.pages_total
        )
        yield self._counter("prefix_cache_queries", "Prompt tokens looked up in the cache.", now.prefix_queries)
        yield self._counter("prefix_cache_hits", "Prompt tokens found in the cache.", now.prefix_hits)
        yield self._counter("num_preemptions", "Requests put back to make room.", now.preemptions)
        if now.speculation is not None:
            drafted, accepted = now.speculation.num_drafts, now.speculation.num_accepted
            yield self._counter("spec_decode_num_draft_tokens", "Drafts verified.", drafted)
            yield self._counter("spec_decode_num_accepted_tokens", "Drafts that the model would have said.", accepted)

    def _gauge(self, name: str, text: str, value: float) -> Metric:
        family = GaugeMetricFamily(PREFIX + name, text, labels=("model_name",))
        family.add_metric((self._model,), value)
        return family

    def _counter(self, name: str, text: str, value: float) -> Metric:
        family = CounterMetricFamily(PREFIX + name, text, labels=("model_name",))
        family.add_metric((self._model,), value)
        return family
