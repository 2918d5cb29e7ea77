"""`scaling`: prefill of a whole model on several meshes of this host's GPUs, or of several processes'.

Nothing is mocked: the collectives are NCCL's, and every device computes what it would in a server. Each row is compared with
the first mesh of `--meshes`. Several processes run the same rows in the same order.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any

from jax_mla_cp.bench.bench_options import FormName, Options
from jax_mla_cp.bench.processes import Processes, ProcessFailed
from jax_mla_cp.bench.program import (
    clean_up,
    compile_program,
    make_build,
    make_model,
    make_planner,
    prompt,
    with_layers,
)
from jax_mla_cp.bench.table import Report
from jax_mla_cp.bench.timing import Agree
from jax_mla_cp.config.model import ModelConfig
from jax_mla_cp.model.loaded_model import Model

_GpuSeconds = dict[tuple[int, FormName], float]
"""GPU-seconds (devices times seconds) of the first mesh, by tokens and form."""


def run(
    options: Options,
    config: ModelConfig,
    report: Report,
    processes: Processes | None = None,
    begin: Callable[[], None] = lambda: None,
) -> None:
    """Adds a row for each mesh, number of tokens and form.

    Args:
      processes: None: this one alone.
      begin: called before the first row, when all settings have been checked.

    Raises:
      ConfigError: a mesh that needs more devices than there are, or of several processes' fewer, or that can't divide the model.
      ProcessFailed: a row failed, which others may be in the middle of.
    """
    processes = processes or Processes()
    layers = min(options.layers or config.num_layers, config.num_layers)
    dense = min(config.num_dense_layers, layers)
    config = with_layers(config, dense, layers - dense, max(options.seq))
    with processes.expect_exit():  # all before any is measured: every process refuses settings that can't work, at once
        meshes = {shape: processes.make_mesh(shape) for shape in options.meshes}
        builds = [
            (mesh, ep, weights, make_build(config, mesh, ep, options.dtype, options.attention, weights))
            for weights, mesh, ep in itertools.product(options.weights_kinds, options.meshes, options.ep_axes)
        ]
    begin()
    gpu_seconds: _GpuSeconds = {}
    for i, (mesh, ep, weights, build) in enumerate(builds):
        # In the first row, so that a failure is a row.
        make = functools.cache(functools.partial(make_model, build, meshes[mesh]))
        for seq, form in itertools.product(options.seq, options.forms):
            row = report.row(
                f"prefill, {options.model}, {layers} layers",
                str(mesh),
                functools.partial(_row, make, seq, form, options.samples, gpu_seconds, processes.slowest, first=i == 0),
                devices=mesh.devices,
                ep_axes=ep,
                seq=seq,
                form=form,
                dtype=options.dtype,
                weights=str(weights),
            )
            if row is None and not processes.alone:
                raise ProcessFailed(f"{mesh}, {seq} tokens: {report.rows[-1]['error']}")
            clean_up()
        make.cache_clear()
        clean_up()
    report.notes.append(
        f"efficiency: GPU-seconds of {options.meshes[0]}, experts over {options.ep_axes[0]}, {options.weights_kinds[0]} weights, divided by the row's; empty if that row "
        "failed. Times are from tokens to the last token's logits, with random weights and even routing."
    )


def _row(
    make: Callable[[], Model],
    seq: int,
    form: FormName,
    samples: int,
    gpu_seconds: _GpuSeconds,
    agree: Agree,
    *,
    first: bool,
) -> dict[str, Any]:
    """Measures a row. `first`: on the mesh that the others are compared with."""
    model = make()
    planner = make_planner(model, seq, form=form)
    program = compile_program(model, planner, prompt(model, planner, seq))
    timing = program.time(samples, agree)
    used = timing.seconds * program.pages.sharding.num_devices
    if first:
        gpu_seconds[seq, form] = used
    compared = {"efficiency": gpu_seconds[seq, form] / used} if (seq, form) in gpu_seconds else {}
    return timing.row() | {"tokens_per_s": seq / timing.seconds} | compared | program.memory
