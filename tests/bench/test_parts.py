"""The benchmarks' arithmetic, by hand: FLOPs, bytes, links, samples, tables."""

from __future__ import annotations

import dataclasses
import io
import json
import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

from jax_mla_cp.bench import data, timing
from jax_mla_cp.bench.bench_options import Options
from jax_mla_cp.bench.decode import _step_cost
from jax_mla_cp.bench.links import communication, query_seconds, work_beside_gather
from jax_mla_cp.bench.model import _between
from jax_mla_cp.bench.profile import scope_of
from jax_mla_cp.bench.program import make_build
from jax_mla_cp.bench.roofline import Ceilings, Cost, attention_flops, rank_rows
from jax_mla_cp.bench.table import Report
from jax_mla_cp.config.errors import ConfigError
from jax_mla_cp.config.presets import model_config
from jax_mla_cp.mesh import MeshShape
from jax_mla_cp.model.loaded_model import expert_bytes, weight_bytes

V3 = model_config("deepseek_v3")
S = 131072


def test_flops_are_those_of_the_published_closed_forms() -> None:
    """DeepSeek-V3, all heads, no prefix: 40,960 S^2 expanded and 139,264 S^2 absorbed, halves of full squares."""
    _, pairs = rank_rows(S, 1, 0)
    assert pairs == S * (S + 1) // 2
    assert attention_flops("expanded", V3, pairs, 128) == pytest.approx(40960 * S * S, rel=1e-5)
    assert attention_flops("absorbed", V3, pairs, 128) == pytest.approx(139264 * S * S, rel=1e-5)


def test_pairs_of_ranks_by_counting() -> None:
    """8 tokens, cp=2: rank 0 has tokens 0, 1, 6, 7, which see 1, 2, 7, 8 keys; rank 1 has 2, 3, 4, 5."""
    rows, pairs = rank_rows(8, 2, 0)
    assert pairs == 1 + 2 + 7 + 8
    assert (rows.cu_q.tolist(), rows.kv_len.tolist()) == ([0, 2, 4], [2, 8])
    assert rank_rows(8, 2, 1)[1] == 3 + 4 + 5 + 6
    for cp in (3, 4, 8):
        assert sum(rank_rows(1000, cp, k)[1] for k in range(cp)) == rank_rows(1000, 1, 0)[1]


def test_roofline() -> None:
    ceilings = Ceilings(matmul=100.0, copy=10.0, read=20.0)
    assert Cost(flops=300).seconds(ceilings) == 3
    assert Cost(flops=300, moved=40, read=40).seconds(ceilings) == 6
    assert Cost(flops=300).row(4.0, ceilings)["fraction"] == 0.75


def test_the_link_model_by_hand() -> None:
    """The tables of reference/math.md: 151 MB of latents at 128K, three quarters of which arrive, 2.27 ms a layer at 50 GB/s."""
    mesh = MeshShape(tp=8, cp=4)
    takes = communication(V3, mesh, "tp", S)
    assert takes.latents / 61 == pytest.approx(0.75 * S * 1152 / 50e9) == pytest.approx(2.27e-3, rel=0.01)
    one_sum = 2 * 7 / 8 * (S // 4) * 7168 * 2 / 360e9
    assert takes.sums == pytest.approx((2 * 61 + 1) * one_sum)
    assert takes.experts == 0
    both = communication(V3, mesh, "tp,cp", S)
    assert both.experts / 58 == pytest.approx(0.75 * S * (4 * 7168 + 64) / 50e9)
    assert both.exposed(hidden=1e9) == both.sums + both.experts
    assert takes.exposed(hidden=0) == takes.total
    # q_a and q_b of a rank: 22 and 75.5 / 8 MFLOP a token.
    assert query_seconds(V3, mesh, S, 600e12) == pytest.approx(61 * (22.02e6 + 75.5e6 / 8) * S / 4 / 600e12, rel=1e-3)


SCHEDULE = """
%body (p: bf16[8,4]) -> bf16[8,4] {
  %all-gather-start.1 = (bf16[2,4]{1,0}, bf16[8,4]{1,0}) all-gather-start(%x), channel_id=1
  %cublas.2 = bf16[2,16] custom-call(%x, %w), metadata={op_name="jit(f)/mla/query/dot_general"}
  %all-gather-done.1 = bf16[8,4]{1,0} all-gather-done(%all-gather-start.1)
}
"""


def test_overlap_is_read_from_the_schedule() -> None:
    assert work_beside_gather(SCHEDULE, 8, 4) is True
    assert work_beside_gather(SCHEDULE.replace("dot_general", "add").replace("%cublas", "%add"), 8, 4) is False
    fp8 = SCHEDULE.replace("dot_general", "ffi_call").replace(
        "custom-call(%x, %w)", 'custom-call(%x), custom_call_target="w8a8"'
    )
    assert work_beside_gather(fp8, 8, 4) is True
    assert work_beside_gather(fp8.replace("w8a8", "quantize_rows"), 8, 4) is False
    assert work_beside_gather(SCHEDULE, 16, 4) is None
    assert work_beside_gather("%all-gather.1 = bf16[8,4] all-gather(%x)", 8, 4) is None


def test_experts_that_a_decode_step_reads() -> None:
    """By hand: 4 of 16 experts a token, 8 on each of two ranks."""

    def untouched(requests: int, *, skewed: bool, bias: bool = True) -> float:
        """The part of this rank's experts that the cost leaves out."""
        config = model_config("tiny")
        if not bias:
            config = dataclasses.replace(config, topk_method="group_limited_greedy", norm_topk_prob=False)
        build = make_build(config, MeshShape(tp=2), "tp", "bfloat16", "xla")
        cache = config.num_layers * requests * 100 * config.latent_dim * 2
        embedding = config.vocab_size // 2 * config.hidden_size * 2
        read = _step_cost(build, requests, 100, skewed=skewed).read
        return (weight_bytes(build) - embedding + cache - read) / expert_bytes(build)

    assert untouched(1, skewed=False) == pytest.approx(3 / 4)
    assert untouched(3, skewed=False) == pytest.approx((3 / 4) ** 3)
    assert untouched(3, skewed=True) == pytest.approx((1 / 2) ** 3), "4 of the first rank's 8"
    assert untouched(3, skewed=True, bias=False) == pytest.approx(1 / 2), "the same 4 for every token"


def test_chunks_between_two_prefixes() -> None:
    times = {0: 1.0, 10: 2.0, 30: 3.0}
    assert [_between(times, at) for at in (0, 5, 10, 20, 30, 50)] == [1, 1.5, 2, 2.5, 3, 4]
    assert _between({0: 1.0}, 7) == 1


def test_scopes() -> None:
    assert scope_of("jit(run)/jit(shmap_body)/while/body/closed_call/mla/latent/dot_general") == "mla/latent"
    assert scope_of("jit(f)/add") == "(no scope)"


def test_samples_and_median(monkeypatch: pytest.MonkeyPatch) -> None:
    """Quick calls are put together until a sample takes 20 ms; the median does not see an outlier."""
    clock, calls = [0.0], [0]

    def call() -> list[jax.Array]:
        calls[0] += 1
        clock[0] += 0.5 if calls[0] == 20 else 0.004
        return []

    monkeypatch.setattr(timing.time, "perf_counter", lambda: clock[0])
    seen = timing.measure(call, samples=5)
    assert seen.samples == 5 and seen.calls >= 5
    assert seen.seconds == pytest.approx(0.004)
    assert seen.spread > 1


def test_random_data_fills_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "_BLOCK", 1000)
    values = np.asarray(data.normal(0, (7, 33, 50), jnp.float32, 2.0))
    assert abs(values.std() - 2) < 0.05 and abs(values.mean()) < 0.05
    assert len(np.unique(values)) > 0.99 * values.size, "no block repeats another"


def test_a_failing_row_leaves_the_others(tmp_path: Path) -> None:
    path = tmp_path / "out.json"
    report = Report("attention", ["attention"], path=path, quiet=True)
    report.ceilings = Ceilings(1e12, 1e9, 1e9)

    def fails() -> dict[str, Any]:
        raise RuntimeError("RESOURCE_EXHAUSTED: out [of]\n memory")

    assert report.row("t", "a", lambda: {"ms": 1.0}, seq=8) is not None
    assert report.row("t", "b", fails, seq=8) is None
    report.hold("fast", 0.9, at_least=0.86)
    report.hold("slow", 1.2, at_most=1.15)
    report.hold("gone", None, at_least=1.4)
    written = json.loads(path.read_text())
    assert [row.get("error") for row in written["rows"]] == [None, "RuntimeError: RESOURCE_EXHAUSTED: out [of] memory"]
    assert [hold["ok"] for hold in written["holds"]] == [True, False, None]
    assert {"device", "jax", "versions", "date", "argv", "ceilings"} <= {*written, *written["versions"]}
    screen = Console(file=io.StringIO(), width=200)
    report.show(screen)
    text = screen.file.getvalue()  # type: ignore[attr-defined]
    for part in ("out [of] memory", "missed", "not measured", "1 of 2 rows failed", ">= 0.86", "tokens 8"):
        assert part in text


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"command": "layer", "platform": "cpu"}, "does not fit a CPU"),
        ({"command": "attention", "platform": "cpu", "seq": (131072,)}, r"seq=\(256,\) heads=\(2,\)"),
        ({"platform": "tpu"}, "platform: must be one of"),
        ({"model": "deepseek_v4"}, "Did you mean"),
        ({"forms": ("expandd",)}, "Did you mean expanded"),
        ({"ep_axes": ("cp",)}, "ep_axes: must be one of"),
        ({"mesh": MeshShape(dp=2)}, "dp only repeats"),
        ({"samples": 0}, "samples: must be whole numbers"),
        ({"cp": (1,)}, "cp: must be whole numbers"),
        ({"json": Path("/nonexistent/x.json")}, "Make it first"),
    ],
)
def test_settings_that_cant_work(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Options(**({"command": "attention"} | changes))


def test_defaults_are_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Options("model").samples = 3  # type: ignore[misc]
    assert math.isclose(V3.num_layers, 61)
