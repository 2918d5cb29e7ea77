"""The benchmarks that run as several processes: `host --processes` and `scaling --coordinator`, on CPU devices."""

from __future__ import annotations

import contextlib
import json
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from jax.sharding import AbstractMesh

from jax_mla_cp.batch.layout import build_batch
from jax_mla_cp.batch.packing import pack
from jax_mla_cp.batch.page_table import TableMirror
from jax_mla_cp.bench import followers, host, timing
from jax_mla_cp.bench.bench_options import make
from jax_mla_cp.bench.echo_process import NullRunner
from jax_mla_cp.bench.host_step import decoding, make_planner
from jax_mla_cp.bench.table import Report
from jax_mla_cp.config.errors import ConfigError
from jax_mla_cp.config.presets import model_config
from jax_mla_cp.distributed.step_message import StepDecoder, StepMessage, encode
from jax_mla_cp.mesh import AXES, MeshShape, make_mesh
from jax_mla_cp.step.inputs import StepInputs
from tests.helpers.processes import started

SMALL = {"model": "tiny", "mesh": MeshShape(tp=2, cp=2), "shapes": ((1, 100), (6, 300)), "samples": 1}


def test_host_with_other_processes() -> None:
    options = make("host", processes=3, **SMALL | {"shapes": ((1, 100), (64, 20))})
    report = Report("host", [], quiet=True)
    host.run(options, model_config("tiny"), report)
    report.show()
    assert not report.failed, [row["error"] for row in report.rows if "error" in row]
    for row in report.rows:
        assert row["processes"] == 3
        parts = [row[f"{name}_ms"] for name in ("engine", "arrays", "pack", "outcomes", "send")]
        assert row["ms"] == pytest.approx(sum(parts))
        assert min(row["send_ms"], row["send_masks_ms"]) > 0 and row["echo_ms"] >= 0
        assert row["arrays_bytes"] < row["message_bytes"] <= row["arrays_bytes"] + 4096
    (more,) = (hold for hold in report.holds if "other processes add" in hold.what)
    assert more.bound == 0.3 and more.seen == row["send_ms"] + row["echo_ms"], "of the row with 64 requests"
    (size,) = (hold for hold in report.holds if hold.what == "bytes of a message beside its arrays")
    assert size.ok and size.bound == 4096


def test_host_alone_has_no_columns_of_other_processes() -> None:
    report = Report("host", [], quiet=True)
    host.run(make("host", **SMALL), model_config("tiny"), report)
    assert not report.failed and not any("send_ms" in row or "message_bytes" in row for row in report.rows)


def test_a_follower_that_is_killed_fails_the_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    real, children = followers._started, []

    @contextlib.contextmanager
    def remembered(*args: Any) -> Iterator[subprocess.Popen[str]]:
        with real(*args) as child:
            children.append(child)
            yield child

    def kill(*args: Any, **kwargs: Any) -> list[float]:
        children[0].kill()
        children[0].wait()
        return [1e-3]

    monkeypatch.setattr(followers, "_started", remembered)
    monkeypatch.setattr(host, "host_seconds", kill)  # the last that a row measures before it sends
    report = Report("host", [], quiet=True)
    host.run(make("host", processes=2, **SMALL), model_config("tiny"), report)
    assert report.failed == 2 and "process 1 (localhost) closed its connection" in report.rows[1]["error"]
    assert all(hold.ok is None for hold in report.holds)


def test_a_follower_that_does_not_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(followers.sys, "executable", "/bin/false")
    with (
        pytest.raises(ConfigError, match="process 1 did not start"),
        followers.leading(make("host", processes=2, **SMALL)),
    ):
        pass


def test_a_planner_without_devices_reads_the_messages() -> None:
    options = make("host", **SMALL)
    config = model_config("tiny")
    planner = make_planner(options, config, make_mesh(options.mesh))
    abstract = make_planner(options, config, AbstractMesh((1, 2, 2), AXES))
    layout = planner.lay_out(decoding(planner, 6, 300))
    update = TableMirror(planner.shape).update(layout.columns, layout.step)
    packed = pack(build_batch(layout, planner.shape, update), options.mesh)
    inputs = StepInputs(layout.step, packed, None, update.whole, update.checksum)
    message = StepDecoder(NullRunner(abstract).planner).decode(memoryview(encode(StepMessage(3, "p", inputs))))
    assert (message.number, message.program, message.inputs.shape) == (3, "p", layout.step)
    assert (message.inputs.batch.rank_words == inputs.batch.rank_words).all()
    assert (message.inputs.batch.group_words == inputs.batch.group_words).all()
    assert message.inputs.batch.fields == inputs.batch.fields
    assert message.inputs.page_table is not None and (message.inputs.page_table == inputs.page_table).all()


@pytest.mark.parametrize("mine", [1e-4, 1e-2, 3.0])
def test_processes_that_agree_run_as_many_calls(mine: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever a process measures itself: the calls follow from the time that all agree on."""
    calls = 0

    def sample(call: Any, count: int) -> float:
        nonlocal calls
        calls += count
        return mine

    monkeypatch.setattr(timing, "_sample", sample)
    measured = timing.measure(lambda: 0, samples=10, agree=lambda seconds: 0.5)
    assert calls == 1 + 3 and measured.calls == 1 and measured.seconds == 0.5


SIZES = ["--platform", "cpu", "--model", "tiny", "--seq", "40", "--layers", "1", "--samples", "1"]


@contextlib.contextmanager
def two(*flags: str, other: tuple[str, ...] = ()) -> Iterator[list[subprocess.Popen[str]]]:
    """`bench scaling` as two processes. `other`: further flags of process 1."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    with contextlib.ExitStack() as stack:
        yield [
            stack.enter_context(
                started(
                    "jax_mla_cp.bench",
                    *["scaling", *SIZES, "--coordinator", address, "--num-processes", "2", "--process-id", str(i)],
                    *flags,
                    *(other if i else ()),
                )
            )
            for i in range(2)
        ]


def ends(processes: list[subprocess.Popen[str]]) -> list[tuple[int, str, str]]:
    """Exit code, standard output and standard error of each."""
    return [(process.wait(300), *process.communicate()) for process in processes]


def test_scaling_as_two_processes(tmp_path: Path) -> None:
    """One row: its compilation is what takes long."""
    files = [tmp_path / f"{i}.json" for i in range(2)]
    with two("--meshes", "cp=2", "--json", str(files[0]), other=("--json", str(files[1]))) as both:
        (code, out, errors), (other_code, other_out, other_errors) = ends(both)
    assert (code, other_code) == (0, 0), errors + other_errors
    assert "cpu, 2 processes" in out and "tp=1,cp=2" in out and "mocked" not in out
    assert "mesh tp=1,cp=2 over 2 processes" in errors
    assert "prefill" not in other_out + other_errors and not files[1].exists(), "process 0 alone reports"
    assert "this is process 1" in other_errors and "stopped: process 0 has ended" in other_errors
    written = json.loads(files[0].read_text())
    assert written["processes"] == 2 and written["devices"] == {"local": 1, "all": 2}
    (row,) = written["rows"]
    assert "error" not in row and (row["devices"], row["efficiency"]) == (2, 1)


def test_a_mesh_of_some_devices_is_refused_by_both() -> None:
    with two("--meshes", "cp=2", "tp=1") as both:
        for code, _, errors in ends(both):
            assert code == 2 and "uses 1 of 2 devices; several processes must use all" in errors


def test_different_flags_are_refused_by_both() -> None:
    with two("--meshes", "cp=2", other=("--seq", "48")) as both:
        for code, _, errors in ends(both):
            assert code == 2 and "--seq: must be the same in all processes: process 1" in errors


def test_a_process_that_is_killed_ends_the_other(tmp_path: Path) -> None:
    with two("--meshes", "cp=2", "tp=2", "--json", str(tmp_path / "0.json")) as (leader, follower):
        assert leader.stderr is not None
        for line in leader.stderr:
            if "measuring" in line:
                break
        follower.kill()
        code, out, errors = ends([leader])[0]
    assert code == 1 and "process 1" in errors and "the cluster ends" in errors
    assert "the run ended early: process 1" in out
    assert "ended early" in json.loads((tmp_path / "0.json").read_text())["notes"][0]
