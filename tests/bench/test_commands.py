"""Each command with tiny sizes on CPU devices: its rows, its file, what it refuses."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import pytest

from jax_mla_cp.bench import attention, decode, engine, host, layer, load, model, program, scaling
from jax_mla_cp.bench.bench_options import Options, make
from jax_mla_cp.bench.roofline import Ceilings
from jax_mla_cp.bench.table import Report
from jax_mla_cp.config.errors import ConfigError
from jax_mla_cp.config.presets import model_config
from jax_mla_cp.config.quantization import Quantization
from jax_mla_cp.mesh import MeshShape
from tests.helpers.processes import environment

MESH = MeshShape(tp=2, cp=2)


def run(module: Any, **flags: Any) -> Report:
    options = Options(platform="cpu", samples=1, **flags)
    report = Report(options.command, [], quiet=True)
    report.ceilings = Ceilings(1e11, 1e10, 1e10)
    module.run(options, model_config(options.model), report)
    assert not report.failed, [row["error"] for row in report.rows if "error" in row]
    report.show()
    json.dumps(report.as_dict(), allow_nan=False)
    return report


def test_attention() -> None:
    report = run(attention, command="attention", model="tiny", attention="xla", seq=(64, 5), heads=(2,), cp=(3,))
    rows = report.rows
    assert len(rows) == 2 * (4 + 1), "both forms: the whole, and 3 ranks; 5 tokens are too few for 3 ranks"
    assert [row["cp"] for row in rows[:4]] == [1, 3, 3, 3]
    assert sum(row.get("balance") is not None for row in rows) == 2, "at the slowest rank of each form"
    # 2 * (h + r + v) * heads * pairs = 2 * 80 * 2 * 2080
    assert rows[0]["tflops"] * rows[0]["ms"] == pytest.approx(2 * 80 * 2 * 2080 / 1e9)


def test_cudnn_beside_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU it can't run: its row says so, and the others stay. XLA's own stands in for it then."""
    options = Options("attention", platform="cpu", model="tiny", attention="xla", samples=1)
    report = Report("attention", [], quiet=True)
    report.ceilings = Ceilings(1e11, 1e10, 1e10)
    bench = attention._Bench(options, model_config("tiny"), report, "xla", 64, 2)
    bench.held = True
    bench.others(1e-3)
    real = jax.nn.dot_product_attention
    monkeypatch.setattr(jax.nn, "dot_product_attention", lambda *a, **k: real(*a, **(k | {"implementation": "xla"})))
    bench.others(1e-3)
    failed, row = report.rows
    assert "error" in failed and report.holds[0].ok is None
    assert row["vs"] == pytest.approx(row["ms"]) and report.holds[1].seen == row["vs"]


def test_attention_through_the_extension() -> None:
    pytest.importorskip("jax_mla_cp._ffi")
    report = run(attention, command="attention", attention="fa3", seq=(48,), heads=(1,), cp=(2,))
    assert [row["what"] for row in report.rows] == ["FA3 expanded"] * 3 + ["FA3 absorbed"] * 3


def test_decode() -> None:
    report = run(decode, command="decode", model="tiny", attention="xla", shapes=((3, 40),), heads=(2,), tokens=(1, 4))
    one, four = report.rows
    assert one["gbs"] * one["ms"] * 1e6 == pytest.approx(2 * 3 * 40 * 48), "each latent once"
    pairs = 3 * (37 + 38 + 39 + 40)
    assert four["tflops"] * four["ms"] == pytest.approx(2 * 80 * 2 * pairs / 1e9)


def test_decode_through_the_extension() -> None:
    pytest.importorskip("jax_mla_cp._ffi")
    report = run(decode, command="decode", attention="fa3", shapes=((2, 64),), heads=(1,), tokens=(1,))
    assert report.rows[0]["what"] == "mla_decode"


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """FP8 in blocks that fit into the small model's matrices."""
    monkeypatch.setattr(program, "FP8_FORMAT", Quantization("fp8", (16, 16)))


def test_the_whole_decode_step(small_blocks: None) -> None:
    report = run(
        decode,
        command="decode",
        model="tiny",
        shapes=((2, 64),),
        heads=(2,),
        tokens=(1,),
        full=True,
        layers=1,
        mesh=MeshShape(tp=2),
        ep_axes=("tp",),
        weights=("bf16", "fp8"),
        fp8_compute=("w8a16",),
    )
    rows = report.rows[-4:]
    assert [row["weights"] for row in rows] == ["bf16", "bf16", "fp8, w8a16", "fp8, w8a16"]
    assert [row["what"] for row in rows] == ["random routing", "all tokens to this rank's experts"] * 2
    assert {(row["mesh"], row["ep_axes"]) for row in rows} == {("tp=2,cp=1", "tp")}
    assert all(row["roof_ms"] > 0 and row["ms"] > 0 for row in rows)
    assert rows[2]["roof_ms"] < rows[0]["roof_ms"], "half the bytes of the experts"


def test_the_engine() -> None:
    report = run(engine, command="engine", model="tiny", shapes=((1, 40), (3, 20)), meshes=(MeshShape(cp=2),), chunk=32)
    assert [(row["what"], row["requests"]) for row in report.rows] == [
        ("ahead", 1),
        ("not ahead", 1),
        ("ahead", 3),
        ("not ahead", 3),
    ]
    for row in report.rows:
        assert row["n"] == 128 and 0 < row["host_ms"] < row["ms"] <= row["p90_ms"]
        assert row["run_ahead"] == (1 if row["what"] == "ahead" else 0)


def test_layer_in_fp8() -> None:
    report = run(
        layer,
        command="layer",
        model="tiny",
        seq=(600,),
        mesh=MeshShape(cp=2),
        forms=("absorbed",),
        ep_axes=("tp",),
        layers=1,
        weights=("fp8",),
    )
    whole = [row["weights"] for row in report.rows if row["what"] == "the whole layer, random routing"]
    assert whole == ["fp8, w8a8"]
    products = [row for row in report.rows if row["what"].startswith("grouped in FP8")]
    assert len(products) == 4 and all(row["tflops"] > 0 and row["weights"] == "fp8, w8a8" for row in products)
    names = {row["what"] for row in report.rows}
    assert {"quantizing the rows, gate and up", "quantizing the rows, down"} <= names


@pytest.mark.parametrize("mocked", [False, True])
def test_layer(mocked: bool, monkeypatch: pytest.MonkeyPatch, small_blocks: None, tmp_path: Path) -> None:
    monkeypatch.setattr(program, "is_mocked", lambda: mocked)
    report = run(
        layer,
        command="layer",
        model="tiny",
        seq=(600,),
        mesh=MESH,
        forms=("expanded",) if mocked else ("absorbed",),
        ep_axes=("tp,cp",) if mocked else ("tp",),
        layers=2,
        profile=None if mocked else tmp_path,
        weights=("bf16", "fp8") if mocked else ("bf16",),
        fp8_compute=("w8a16",),
    )
    whole = next(row for row in report.rows if row["what"] == "the whole layer")
    assert whole["to_sum"] == pytest.approx(whole["ms"] / whole["roof_ms"])
    assert whole["dtype"] == "bfloat16" and "ep_axes" in whole
    names = {row["what"] for row in report.rows}
    assert {"q_a", "q_b", "kv_a", "o", "cache write", "router", "the whole layer, random routing"} <= names
    assert "the whole layer, all tokens to this rank's experts" in names
    if mocked:
        layers = [row for row in report.rows if row["what"].startswith("the whole layer")]
        kinds = ["bf16", "fp8, w8a16"]
        assert [row["weights"] for row in layers] == [*kinds, *(kind for kind in kinds for _ in range(2))]
        assert layers[4]["args_gb"] < 0.7 * layers[2]["args_gb"], "the experts take half the memory"
    if not mocked:
        scopes = {row["what"] for row in report.rows if "time by scope" in row["table"]}
        assert {"mla/latent", "mla/output"} <= scopes


def test_model() -> None:
    report = run(
        model,
        command="model",
        model="tiny",
        seq=(300, 600),
        long=(1200,),
        chunk=600,
        mesh=MESH,
        layers=2,
        forms=("expanded",),
        ep_axes=("tp",),
    )
    one, many, skewed = report.rows[:3]
    layer_ms = many["ms"] - one["ms"]
    assert many["ttft_compute_s"] == pytest.approx((many["ms"] + layer_ms) / 1e3), "3 MoE layers, of which 2 ran"
    assert many["ttft_s"] == pytest.approx(many["ttft_compute_s"] + many["exposed_s"])
    assert many["total_gb"] > 0 and skewed["ttft_compute_s"] > 0
    first = [row for row in report.rows if row["table"] == "time to first token"]
    assert [(row["what"], row["seq"]) for row in first] == [
        ("whole prompt", 300),
        ("whole prompt", 600),
        ("chunks of 600", 1200),
    ]
    assert first[0]["ttft_compute_s"] == pytest.approx(first[0]["ms"] / 1e3 * 4 / 2)


def test_load(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    sizes = {
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 64,
        "moe_intermediate_size": 16,
        "q_lora_rank": 16,
        "n_routed_experts": 8,
    }
    monkeypatch.setattr(load, "_RAW", load._RAW | sizes)
    monkeypatch.setattr(load, "_GB", 12_000_000)
    report = run(load, command="load", gb=1, mesh=MESH, scratch=tmp_path)
    rows = [row for row in report.rows if row["table"] == "load"]
    assert [(row["mesh"], row["cache"], row["what"]) for row in rows] == [
        (mesh, cache, kind)
        for mesh in ("no mesh", "tp=2,cp=2")
        for cache in ("warm", "cold")
        for kind in ("safetensors", "Orbax")
    ]
    assert 0.008 < report.rows[0]["gb"] <= 0.012, "what was asked for, in whole layers"
    assert len(report.holds) == 4 * 3 and not list(tmp_path.iterdir())


def scale(**flags: Any) -> tuple[Options, Report]:
    options = make(
        "scaling",
        platform="cpu",
        model="tiny",
        samples=1,
        seq=(40,),
        layers=1,
        **{"meshes": (MeshShape(), MeshShape(cp=2))} | flags,
    )
    return options, Report(options.command, [], quiet=True)


def test_scaling_compares_with_the_first_mesh(monkeypatch: pytest.MonkeyPatch) -> None:
    options, report = scale()
    scaling.run(options, model_config("tiny"), report)
    report.show()
    one, two = report.rows
    assert (one["efficiency"], one["devices"], two["devices"]) == (1, 1, 2)
    assert two["efficiency"] == pytest.approx(one["ms"] / (2 * two["ms"]))
    assert one["tokens_per_s"] == pytest.approx(40 / one["ms"] * 1e3)

    real = scaling.make_model

    def no_room_on_one(build: Any, mesh: Any) -> Any:
        if build.shape.devices == 1:
            raise MemoryError("no room")
        return real(build, mesh)

    monkeypatch.setattr(scaling, "make_model", no_room_on_one)
    options, report = scale()
    scaling.run(options, model_config("tiny"), report)
    one, two = report.rows
    assert "no room" in one["error"] and "efficiency" not in two, "or the second would be its own measure"


def test_scaling_refuses_before_it_measures() -> None:
    for mesh, message in ((MeshShape(tp=3), "tp=3"), (MeshShape(cp=64), "needs 64 devices")):
        options, report = scale(meshes=(MeshShape(), mesh))
        with pytest.raises(ConfigError, match=message):
            scaling.run(options, model_config("tiny"), report)
        assert not report.rows


def test_host() -> None:
    report = run(host, command="host", shapes=((1, 100), (6, 300)), mesh=MESH)
    for row, requests in zip(report.rows, (1, 6), strict=True):
        assert row["requests"] == requests
        parts = [row[name] for name in ("engine_ms", "arrays_ms", "pack_ms", "outcomes_ms")]
        assert row["ms"] == pytest.approx(sum(parts))
        assert min(*parts, row["put_ms"]) > 0
    few, many = (row["bytes"] for row in report.rows)
    assert few == many, "places for all requests that may run, whoever does"
    assert not report.holds


def test_host_holds_the_bytes_of_long_requests() -> None:
    report = run(host, command="host", shapes=((64, 128 * 1024),), mesh=MESH)
    (size,) = (hold for hold in report.holds if "bytes to the devices" in hold.what)
    assert size.seen == report.rows[0]["bytes"] and size.ok and size.bound == 65536


def bench(*flags: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "jax_mla_cp.bench", *flags]
    return subprocess.run(command, env=environment(), text=True, capture_output=True, timeout=300, check=False)


def test_as_a_user_runs_it(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    flags = ["--platform", "cpu", "--model", "tiny", "--seq", "64", "--heads", "2", "--cp", "2", "--samples", "1"]
    done = bench("attention", *flags, "--json", str(path))
    assert done.returncode == 0, done.stderr
    assert "ceilings of this run" in done.stdout and "XLA absorbed" in done.stdout
    assert "measuring what the device can do" in done.stderr
    written = json.loads(path.read_text())
    assert written["platform"] == "cpu" and written["argv"][0] == "attention" and written["ceilings"]["matmul"] > 0
    assert len(written["rows"]) == 6


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["attention"], "--platform: cuda needs a GPU, and JAX finds none"),
        (["model", "--platform", "cpu"], "--model tiny"),
        (["attention", "--seq", "1G"], "must be whole numbers"),
        (["decode", "--shapes", "64"], "REQUESTSxCONTEXT"),
        (["layer", "--mesh", "tp=x"], "whole number"),
        (["layer", "--formz", "absorbed"], "Did you mean --forms"),
        (["atention"], "attention"),
        ([], "COMMAND"),
    ],
)
def test_settings_that_cant_work(flags: list[str], message: str) -> None:
    done = bench(*flags)
    assert done.returncode == 2
    assert message in done.stderr and "Traceback" not in done.stderr
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    "command",
    [(), ("attention",), ("layer",), ("model",), ("decode",), ("load",), ("host",), ("scaling",), ("engine",)],
)
def test_help_teaches(command: tuple[str, ...]) -> None:
    done = bench(*command, "--help")
    assert done.returncode == 0 and "method:" in done.stdout
    assert not command or "examples:" in done.stdout
