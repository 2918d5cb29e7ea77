"""/metrics and /status over the engine with its stand-in model: what they say is what happened."""

from __future__ import annotations

import math
import re
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import prometheus_client
import pytest
from fastapi.testclient import TestClient
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.openmetrics.parser import text_string_to_metric_families as open_metrics
from prometheus_client.parser import text_string_to_metric_families as plain

from jax_mla_cp.distributed.leader import ProcessStatus
from jax_mla_cp.engine import CompileProgress, Engine, PrefillReport, RequestReport, StepReport
from jax_mla_cp.mesh import MeshShape
from jax_mla_cp.serve.app import create_app
from jax_mla_cp.serve.metrics import Metrics
from jax_mla_cp.serve.served_model import ServedModel
from jax_mla_cp.serve.status import Telemetry
from jax_mla_cp.serve.status.prefill_history import PrefillHistory
from jax_mla_cp.serve.status.schemas import Status
from jax_mla_cp.serve.status.server_info import ServerInfo
from jax_mla_cp.serve.status.sliding_window import WINDOW_SECONDS, LatencyWindow, RateWindow, percentile
from jax_mla_cp.serve.status.static_files import load_static_files
from tests.helpers.byte_tokenizer import byte_tokenizer
from tests.helpers.engine_requests import RecordedRequest, is_idle
from tests.helpers.standin import PageModel
from tests.helpers.waiting import until

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "observability.md"
PROCESSES = [ProcessStatus(0, "a", 0.0, 7, 0.5), ProcessStatus(1, "b", 1.5, 6, 0.25)]
BODY = {"model": "tiny", "max_tokens": 6, "ignore_eos": True}


class Observed:
    def __init__(self, pages: int = 40, processes: list[ProcessStatus] | None = None, **model: int) -> None:
        self.model = PageModel(pages=pages, cp=2, **model)
        info = ServerInfo("tiny", 100, False, MeshShape(cp=2, tp=3), {"version": "0.0"})
        telemetry = Telemetry(info, None if processes is None else lambda: processes)
        self.engine = Engine(self.model, observer=telemetry)
        served = ServedModel("tiny", self.engine, byte_tokenizer(), 259, 100, (3,), None)
        self.client = TestClient(create_app(served, telemetry=telemetry))
        self.engine.start()

    def complete(self, prompt: list[int], **more: object) -> int:
        return self.client.post("/v1/completions", json={**BODY, "prompt": prompt, **more}).status_code

    def values(self) -> dict[str, float]:
        """`now`, when the engine is idle and has told of its last step: its requests have heard of their end before."""
        until(lambda: is_idle(self.engine) and self.now()["engine_step_seconds_count"] == self.model.steps)
        return self.now()

    def now(self) -> dict[str, float]:
        return samples(self.client.get("/metrics").text)


def samples(text: str) -> dict[str, float]:
    """Sample -> value, labels other than the model's in braces."""
    found = {}
    for family in plain(text):
        for sample in family.samples:
            assert sample.labels["model_name"] == "tiny"
            rest = ",".join(f"{k}={v}" for k, v in sample.labels.items() if k != "model_name")
            found[sample.name.removeprefix("jax_mla_cp:") + (f"{{{rest}}}" if rest else "")] = sample.value
    return found


@pytest.fixture
def observed() -> Iterator[Observed]:
    observed = Observed()
    yield observed
    observed.engine.stop(5)


def test_counts_are_those_of_the_requests(observed: Observed) -> None:
    prompt = [t % 250 for t in range(40)]
    assert observed.complete(prompt) == 200
    first = observed.values()
    assert first["prompt_tokens_total"] == 40 and first["generation_tokens_total"] == 6
    assert first["cp_prefill_steps_total"] == 3, "40 tokens in steps of 16"
    assert first["cp_prefill_balance_count"] == 3 and 2.7 < first["cp_prefill_balance_sum"] <= 3
    assert first["time_to_first_token_seconds_count"] == 1 and first["inter_token_latency_seconds_count"] == 5
    assert first["request_success_total{finished_reason=length}"] == 1
    assert first["request_prompt_tokens_bucket{le=50.0}"] == 1 and first["request_prompt_tokens_bucket{le=20.0}"] == 0
    assert first["request_generation_tokens_sum"] == 6
    assert first["engine_step_host_seconds_count"] == observed.model.steps
    assert first["engine_step_seconds_sum"] >= first["engine_step_host_seconds_sum"] > 0
    parts = [first[f"request_{part}_time_seconds_sum"] for part in ("queue", "prefill", "decode")]
    assert first["e2e_request_latency_seconds_sum"] == pytest.approx(sum(parts)) and min(parts) > 0
    assert (first["prefix_cache_queries_total"], first["prefix_cache_hits_total"]) == (40, 0)
    assert observed.complete(prompt) == 200
    again = observed.values()
    reused = again["prefix_cache_hits_total"]
    assert reused >= 32 and again["prefix_cache_queries_total"] == 80
    assert again["prompt_tokens_total"] == 80 - reused, "reused tokens are not computed"
    assert (again["num_requests_running"], again["num_requests_waiting"], again["kv_cache_usage_perc"]) == (0, 0, 0)


def test_every_number_has_its_place() -> None:
    """Each is told a value that no other is."""
    metrics = Metrics("tiny", 1000, {})
    metrics.step(StepReport(0.01, 0.002, True, 30, 7, 8, (20, 17), (100, 60), ()))
    metrics.started(0.1)
    metrics.first_token(0.3)
    metrics.token(0.05)
    metrics.token(0.06)
    metrics.finished(RequestReport("stop", 30, 10, 3, queue_seconds=0.1, prefill_seconds=0.2, e2e_seconds=0.7))
    for reason in ("abort", "timeout"):
        metrics.finished(RequestReport(reason, 999, 0, 999, queue_seconds=99, prefill_seconds=99, e2e_seconds=99))
    found = samples(metrics.render("")[0].decode())
    assert {
        name: pytest.approx(value) for name, value in found.items() if "{" not in name and "_count" not in name
    } == {
        "prompt_tokens_total": 30,
        "generation_tokens_total": 3,
        "cp_prefill_steps_total": 1,
        "time_to_first_token_seconds_sum": 0.3,
        "inter_token_latency_seconds_sum": 0.11,
        "request_queue_time_seconds_sum": 0.1,
        "request_prefill_time_seconds_sum": 0.2,
        "request_decode_time_seconds_sum": 0.4,
        "e2e_request_latency_seconds_sum": 0.7,
        "request_prompt_tokens_sum": 30,
        "request_generation_tokens_sum": 3,
        "cp_prefill_balance_sum": 0.8,
        "engine_step_seconds_sum": 0.01,
        "engine_step_host_seconds_sum": 0.002,
        "engine_info": 1,
    }
    ended = {name: value for name, value in found.items() if name.startswith(("request_success", "request_failure"))}
    assert ended == {
        "request_success_total{finished_reason=stop}": 1,
        "request_success_total{finished_reason=abort}": 1,
        "request_failure_total{kind=timeout}": 1,
    }


def test_what_is_true_at_a_moment() -> None:
    """Two run, on 6 pages each, and one waits, which gives up; the two do not fit the 12 pages to their ends."""
    observed = Observed(pages=12, max_running=2)
    observed.model.gate = gate = threading.Semaphore(2)  # 32 of the 40 prompt tokens
    asked = [RecordedRequest([i] * 20, 9) for i in range(3)]
    try:
        observed.engine.submit_all([a.request for a in asked])
        until(lambda: observed.now()["engine_step_seconds_count"] == 2)
        until(lambda: observed.now()["kv_cache_usage_perc"] == 1)
        now = observed.now()
        assert (now["num_requests_running"], now["num_requests_waiting"]) == (2, 1)
        observed.engine.abort(asked[2].request)
        gate.release(10_000)
        for a in asked[:2]:
            a.result()
        after = observed.values()
        assert after["request_success_total{finished_reason=abort}"] == 1
        assert after["num_preemptions_total"] == observed.engine.status().preemptions > 0
    finally:
        gate.release(10_000)
        observed.engine.stop(30)


def test_failures_are_counted_by_kind_and_in_no_latency(observed: Observed) -> None:
    observed.model.fail_next = 1
    assert observed.complete([1, 2, 3]) == 500
    values = observed.values()
    assert values["request_failure_total{kind=step}"] == 1
    assert values["e2e_request_latency_seconds_count"] == 0
    assert not any(name.startswith("request_success") for name in values)


def test_drafts_are_counted_where_there_is_speculation(observed: Observed) -> None:
    assert not any(name.startswith("spec_decode") for name in observed.values())
    drafting = Observed(draft_tokens=2)
    try:
        assert drafting.complete([1, 2, 3], max_tokens=30) == 200
        values = drafting.values()
        drafted, accepted = (values[f"spec_decode_num_{kind}_tokens_total"] for kind in ("draft", "accepted"))
        assert 0 < accepted < drafted
        assert drafting.client.get("/status").json()["speculation"] == {"drafted": drafted, "accepted": accepted}
    finally:
        drafting.engine.stop(5)


def test_both_formats_have_the_same_samples(observed: Observed) -> None:
    observed.complete([5] * 20)
    answer = observed.client.get("/metrics")
    assert answer.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    # What Prometheus 3 sends.
    accept = "application/openmetrics-text;version=1.0.0;escaping=allow-utf-8;q=0.5,text/plain;version=0.0.4;q=0.2"
    modern = observed.client.get("/metrics", headers={"accept": accept})
    assert modern.headers["content-type"] == "application/openmetrics-text; version=1.0.0; charset=utf-8"
    texts = (plain(answer.text), open_metrics(modern.text))
    got = [{(s.name, tuple(sorted(s.labels.items()))) for f in families for s in f.samples} for families in texts]
    assert got[0] == got[1]
    assert got[0] and all(name.startswith("jax_mla_cp:") for name, _ in got[0])


@pytest.mark.parametrize(
    "accept",
    ["application/openmetrics-text;version=x;escaping=y", "text/plain;version=1.0.0;escaping=y", "", "*/*", ";,;"],
)
def test_any_accept_header_is_answered(observed: Observed, accept: str) -> None:
    assert observed.client.get("/metrics", headers={"accept": accept}).status_code == 200


def test_two_servers_share_nothing(observed: Observed) -> None:
    other = Observed()
    try:
        observed.complete([1, 2, 3])
        assert other.values()["generation_tokens_total"] == 0
        assert b"jax_mla_cp" not in prometheus_client.generate_latest(), "nothing in the global registry"
    finally:
        other.engine.stop(5)


def test_the_document_has_every_metric_and_no_other() -> None:
    drafting = Observed(draft_tokens=2, processes=PROCESSES)
    try:
        names = {family.name for family in plain(drafting.client.get("/metrics").text)}
    finally:
        drafting.engine.stop(5)
    documented = set(re.findall(r"^\| `([a-z0-9_]+)", DOCUMENT.read_text(), re.M))
    assert {name.removeprefix("jax_mla_cp:") for name in names} == {name.removesuffix("_total") for name in documented}


def test_every_process_is_shown() -> None:
    several = Observed(processes=PROCESSES)
    try:
        status = Status.model_validate_json(several.client.get("/status").text)
        families = {family.name: family for family in plain(several.client.get("/metrics").text)}
    finally:
        several.engine.stop(5)
    assert status.processes is not None and [p.model_dump() for p in status.processes] == [
        {"process": 0, "host": "a", "heartbeat_age": 0.0, "step": 7, "step_seconds": 0.5},
        {"process": 1, "host": "b", "heartbeat_age": 1.5, "step": 6, "step_seconds": 0.25},
    ]
    for name, values in (
        ("process_heartbeat_age_seconds", (0.0, 1.5)),
        ("process_step", (7, 6)),
        ("process_step_seconds", (0.5, 0.25)),
    ):
        found = [(s.labels["process"], s.labels["host"], s.value) for s in families[f"jax_mla_cp:{name}"].samples]
        assert found == [("0", "a", values[0]), ("1", "b", values[1])]


def test_a_process_that_is_alone_shows_none(observed: Observed) -> None:
    assert observed.client.get("/status").json()["processes"] is None
    assert "process_heartbeat" not in observed.client.get("/metrics").text


def test_status_shows_the_zigzag(observed: Observed) -> None:
    assert observed.client.get("/status").json()["prefill"] is None
    observed.complete([t % 250 for t in range(40)])
    answer = observed.client.get("/status")
    assert answer.headers["cache-control"] == "no-store"
    status = Status.model_validate_json(answer.text)
    assert status.healthy and status.reason is None
    assert (status.mesh.dp, status.mesh.cp, status.mesh.tp) == (1, 2, 3)
    assert status.pages.total == 40 and status.pages.used + status.pages.cached + status.pages.free == 40
    prefill = status.prefill
    assert prefill is not None and sum(prefill.tokens) == 8 and len(prefill.pairs) == 2
    assert sum(prefill.pairs) == sum(range(33, 41)), "the last 8 tokens see 33 to 40 keys"
    (prompt,) = prefill.prompts
    assert (prompt.total, prompt.done, prompt.reused, prompt.active) == (40, 40, 0, True)
    assert [step.start for step in prompt.steps] == [0, 16, 32]
    assert [(c.rank, c.start, c.end) for c in prompt.steps[1].chunks] == [
        (0, 16, 20),
        (1, 20, 24),
        (1, 24, 28),
        (0, 28, 32),
    ]
    assert status.ttft.summary is not None and status.itl.summary is not None
    assert status.ttft.series and status.step_time.series


def test_status_shows_a_compilation(observed: Observed) -> None:
    assert observed.client.get("/status").json()["compiling"] is None
    observed.model.compiling = CompileProgress(1, 7, 512, time.monotonic() - 3)
    compiling = observed.client.get("/status").json()["compiling"]
    assert 3 <= compiling.pop("seconds") < 60
    assert compiling == {"done": 1, "total": 7, "tokens": 512}


def test_status_tells_why_the_engine_is_not_well(observed: Observed) -> None:
    observed.engine.stop(5)
    status = observed.client.get("/status").json()
    assert not status["healthy"] and status["reason"]


def test_status_and_metrics_are_in_the_openapi(observed: Observed) -> None:
    document = observed.client.get("/openapi.json").json()
    schema = document["paths"]["/status"]["get"]["responses"]["200"]["content"]["application/json"]["schema"]
    assert schema == {"$ref": "#/components/schemas/Status"}
    assert "text/plain" in document["paths"]["/metrics"]["get"]["responses"]["200"]["content"]
    assert "/" not in document["paths"]


def test_the_page_has_types_and_a_strict_policy(observed: Observed) -> None:
    page = observed.client.get("/")
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    for name, kind in (("main.js", "text/javascript"), ("style.css", "text/css"), ("icon.svg", "image/svg+xml")):
        answer = observed.client.get(f"/page/{name}")
        assert answer.status_code == 200 and answer.headers["content-type"].startswith(kind)
        assert answer.headers["x-content-type-options"] == "nosniff"
        same = observed.client.get(f"/page/{name}", headers={"if-none-match": answer.headers["etag"]})
        assert same.status_code == 304 and not same.content
        other = observed.client.get(f"/page/{name}", headers={"if-none-match": '"0"'})
        assert other.status_code == 200
    policy = page.headers["content-security-policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy and "http" not in policy
    assert observed.client.head("/").status_code == 200


def test_the_page_asks_for_nothing_but_its_own_files() -> None:
    files = {name: file.body.decode() for name, file in load_static_files().items()}
    page = files["index.html"]
    wanted = set(re.findall(r'(?:src|href)="page/([^"]+)"', page))
    for name, text in files.items():
        wanted |= set(re.findall(r'from "\./([^"]+)"', text))
        assert "http" not in text.replace("http://www.w3.org/", ""), f"{name} leaves the server"
        assert "innerHTML" not in text and "insertAdjacentHTML" not in text
    assert wanted | {"index.html"} == set(files)
    assert not re.search(r"\son\w+=|\sstyle=|<style|<script>", page), "the policy would refuse it"
    ids = set(re.findall(r'id="([^"]+)"', page))
    used = {i for text in files.values() for i in re.findall(r'(?:byId|text)\("([a-z-]+)"', text)}
    assert used <= ids


@pytest.mark.parametrize(
    "path",
    [
        "..%2f__init__.py",
        "%2e%2e/telemetry.py",
        "../server_info.py",
        "/etc/passwd",
        "__init__.py",
        "%00",
        "index.html%00.js",
        "",
    ],
)
def test_nothing_outside_the_folder_is_served(observed: Observed, path: str) -> None:
    answer = observed.client.get(f"/page/{path}")
    assert answer.status_code == 404 and answer.json()["error"]["message"]


REPORT = StepReport(
    seconds=0.1,
    host_seconds=0.01,
    overlapped=False,
    prefill_tokens=8,
    decode_tokens=0,
    requests=1,
    rank_tokens=(4, 4),
    rank_pairs=(18, 18),
    prefills=(),
)


def test_a_preempted_prompt_begins_again() -> None:
    prompts = PrefillHistory()
    for cached in (0, 16):
        prompts.step([PrefillReport("a", cached, 16, 48)])
    prompts.step([PrefillReport("a", 8, 16, 49)])
    (shown,) = prompts.latest(cp=2)
    assert (shown.reused, shown.done, shown.total, [s.start for s in shown.steps]) == (8, 24, 49, [8])


def test_only_recent_prompts_are_kept() -> None:
    prompts = PrefillHistory()
    for n in range(100):
        prompts.step([PrefillReport(f"r{n}", 0, 4, 4), PrefillReport("long", 4 * n, 4, 400)])
    shown = prompts.latest(cp=1)
    assert len(shown) == 6 and {p.id for p in shown if p.active} == {"r99", "long"}
    assert max(len(p.steps) for p in shown) == 24


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def test_latencies_forget_what_is_two_minutes_old() -> None:
    clock = Clock()
    latencies, rates = LatencyWindow(clock), RateWindow(clock)
    assert latencies.summary() is None and latencies.series() == []
    for _ in range(500):
        latencies.add(0.1)
        rates.add(3)
        clock.now += 1
    assert len(latencies.series()) == WINDOW_SECONDS - 1 and latencies.series()[0][0] == WINDOW_SECONDS - 1
    assert rates.series() == [(age, 3) for age in range(WINDOW_SECONDS - 1, 0, -1)]
    clock.now += WINDOW_SECONDS
    assert latencies.summary() is None and rates.series() == []


def test_rates_leave_out_the_second_that_is_not_over() -> None:
    clock = Clock()
    rates = RateWindow(clock)
    rates.add(2)
    rates.add(5)
    assert rates.series() == []
    clock.now += 1
    assert rates.series() == [(1, 7)]


@given(st.lists(st.floats(1e-5, 1e4), min_size=1, max_size=60), st.sampled_from([0.5, 0.99]))
def test_percentiles_are_within_the_buckets(values: list[float], share: float) -> None:
    clock = Clock()
    latencies = LatencyWindow(clock)
    for value in values:
        latencies.add(value)
    summary = latencies.summary()
    assert summary is not None
    exact = sorted(values)[math.ceil(share * len(values)) - 1]
    assert summary[0 if share == 0.5 else 1] == pytest.approx(exact, rel=0.05)


def test_percentile_of_one_value() -> None:
    assert percentile({8: 1}, 0.99) == 2.0
