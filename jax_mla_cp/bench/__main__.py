"""`python -m jax_mla_cp.bench`: runs one benchmark. See `--help`."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

from jax_mla_cp.version import program_imports

with program_imports():
    from jax_mla_cp.bench.bench_flags import make_parser, parse
    from jax_mla_cp.bench.bench_options import Options
    from jax_mla_cp.cli import fail
    from jax_mla_cp.config.errors import ConfigError
    from jax_mla_cp.mesh import MeshShape

_WITHOUT_KERNELS = ("load", "host")
"""Commands that don't measure the device."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one benchmark. Exit code 0; 1 if a row failed; 2 for a setting that can't work; 130 after Ctrl-C."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv[:1] == ["serve"]:  # a client: it has no device, and other flags
        from jax_mla_cp.bench.serve.main import main as serve

        return serve(argv[1:])
    if argv[:1] == ["peer"]:  # has a server, or a model of its own
        from jax_mla_cp.bench.peer.main import main as peer

        return peer(argv[1:])
    options = parse(argv)
    if options.cluster.is_cluster:
        from jax_mla_cp.bench.together import run_together

        run_together(options, argv)
    from jax_mla_cp.bench import mock

    try:
        mock.start(options.platform, _topology(options), profile=options.profile is not None)
        return _run(options, argv)
    except ConfigError as error:
        fail(error, make_parser(), options.command)


def _topology(options: Options) -> MeshShape | None:
    """The mesh to mock, or to make virtual devices for; None: use the devices as they are."""
    if options.command in ("layer", "model", "host") or options.full:
        return options.mesh
    if options.platform == "cpu" and options.command == "load":
        return options.mesh
    if options.platform == "cpu" and options.command in ("scaling", "engine"):
        return max(options.meshes, key=lambda mesh: mesh.devices)
    return None


def _run(options: Options, argv: list[str]) -> int:
    from jax_mla_cp.bench.roofline import measure_ceilings
    from jax_mla_cp.bench.table import Report
    from jax_mla_cp.config.presets import model_config

    report = Report(options.command, argv, path=options.json)
    stopped = False
    try:
        if options.command not in _WITHOUT_KERNELS:
            report.say("measuring what the device can do")
            report.ceilings = measure_ceilings(small=options.platform == "cpu", samples=options.samples)
        command = importlib.import_module(f"jax_mla_cp.bench.{options.command}")
        command.run(options, model_config(options.model), report)
    except KeyboardInterrupt:
        report.notes.append("stopped with Ctrl-C: the tables hold what was measured until then.")
        stopped = True
    if options.platform == "cpu" and options.command not in _WITHOUT_KERNELS:
        report.notes.append("on a CPU these numbers only show that the program runs.")
    report.save()
    report.show()
    return 130 if stopped else int(report.failed > 0)


if __name__ == "__main__":
    raise SystemExit(main())
