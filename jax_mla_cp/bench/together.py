"""`scaling` as one of several processes: all run the same rows, process 0 reports."""

from __future__ import annotations

import dataclasses
import logging
import threading
from collections.abc import Sequence
from typing import NoReturn

import jax

from jax_mla_cp.bench import scaling
from jax_mla_cp.bench.bench_flags import make_parser
from jax_mla_cp.bench.bench_options import Options
from jax_mla_cp.bench.processes import Processes, ProcessFailed
from jax_mla_cp.bench.roofline import measure_ceilings
from jax_mla_cp.bench.table import Report
from jax_mla_cp.config.presets import model_config
from jax_mla_cp.distributed.agreement import agree
from jax_mla_cp.distributed.exit import ending_program, exit_now
from jax_mla_cp.distributed.follower import Follower
from jax_mla_cp.distributed.leader import Leader
from jax_mla_cp.launch import LaunchOptions, detect, set_up_devices
from jax_mla_cp.platform import versions
from jax_mla_cp.serve import logs

log = logging.getLogger(__name__)

_OWN = frozenset({"json", "cluster"})
"""Options that may differ between processes."""
_TELL_SECONDS = 0.5
"""Time for the reason to reach the other processes."""


def run_together(options: Options, argv: Sequence[str]) -> NoReturn:
    """Runs the benchmark and ends this process, with the program's exit codes; 1 also tells that another process was lost."""
    with ending_program(options.cluster, make_parser(), options.command), logs.to_stderr("info", "text"):
        try:
            code = _run(options, argv)
        except KeyboardInterrupt:
            code = 130
        exit_now(code)


def _run(options: Options, argv: Sequence[str]) -> int:
    cluster = {
        field.name: getattr(detect(options.cluster), field.name) for field in dataclasses.fields(options.cluster)
    }
    launch = LaunchOptions(mesh=options.meshes[0], platform=options.platform, compile_cache="off", **cluster)
    member = set_up_devices(launch).member
    assert member is not None
    agree(member, "settings", _facts(options))
    report = Report(
        options.command, argv, path=options.json if member.cluster.leads else None, quiet=not member.cluster.leads
    )
    code = 0
    try:
        _measure(options, report, member)
    except KeyboardInterrupt:
        if isinstance(member, Follower):
            raise
        report.notes.append("stopped with Ctrl-C: the tables hold what was measured until then.")
        code = 130
    if isinstance(member, Follower):
        threading.Event().wait()  # until process 0 ends this process
    else:
        _show(options, report)
        code = member.stop() or code
    return code


def _measure(options: Options, report: Report, member: Leader | Follower) -> None:
    """Runs all rows. One that fails ends all processes, as the loss of one does."""

    def lost(reason: str, code: int) -> None:
        report.notes.append(f"the run ended early: {reason}")
        _show(options, report)
        exit_now(code, after=_TELL_SECONDS)

    def begin() -> None:
        if isinstance(member, Leader):
            report.say("measuring what the device can do")
            report.ceilings = measure_ceilings(small=options.platform == "cpu", samples=options.samples)

    if isinstance(member, Leader):
        member.on_failure = lost
    try:
        scaling.run(options, model_config(options.model), report, Processes(member), begin)
    except ProcessFailed as error:
        member.fail_here(f"a row failed: {error}")
        threading.Event().wait()  # in process 0, until `lost` has ended it


def _show(options: Options, report: Report) -> None:
    if options.platform == "cpu":
        report.notes.append("on a CPU these numbers only show that the program runs.")
    report.save()
    report.show()


def _facts(options: Options) -> dict[str, object]:
    """The facts that the processes agree on."""
    shared = {
        field.name: getattr(options, field.name) for field in dataclasses.fields(options) if field.name not in _OWN
    }
    return {**versions(), "device": jax.local_devices()[0].device_kind, **shared}
