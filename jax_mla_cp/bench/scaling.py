"""`scaling`: prefill of a whole model on several meshes of this host's GPUs.

Nothing is mocked: the collectives are NCCL's, and every device computes what it would in a server. Each row is compared with
the first mesh of `--meshes`.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any

from jax_mla_cp.bench.bench_options import FormName, Options
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
from jax_mla_cp.config.model import ModelConfig
from jax_mla_cp.mesh import make_mesh
from jax_mla_cp.model.loaded_model import Model

_GpuSeconds = dict[tuple[int, FormName], float]
"""GPU-seconds (devices times seconds) of the first mesh, by tokens and form."""


def run(options: Options, config: ModelConfig, report: Report) -> None:
    """Adds a row for each mesh, number of tokens and form.

    Raises:
      ConfigError: a mesh that needs more devices than there are, or that can't divide the model.
    """
    for mesh in options.meshes:
        make_mesh(mesh)
    layers = min(options.layers or config.num_layers, config.num_layers)
    dense = min(config.num_dense_layers, layers)
    config = with_layers(config, dense, layers - dense, max(options.seq))
    builds = [  # all before any is measured: settings that can't work are refused at once
        (mesh, ep, make_build(config, mesh, ep, options.dtype, options.attention))
        for mesh, ep in itertools.product(options.meshes, options.ep_axes)
    ]
    gpu_seconds: _GpuSeconds = {}
    for i, (mesh, ep, build) in enumerate(builds):
        make = functools.cache(functools.partial(make_model, build))  # in the first row, so that a failure is a row
        for seq, form in itertools.product(options.seq, options.forms):
            report.row(
                f"prefill, {options.model}, {layers} layers",
                str(mesh),
                functools.partial(_row, make, seq, form, options.samples, gpu_seconds, first=i == 0),
                devices=mesh.devices,
                ep_axes=ep,
                seq=seq,
                form=form,
                dtype=options.dtype,
            )
            clean_up()
        make.cache_clear()
        clean_up()
    report.notes.append(
        f"efficiency: GPU-seconds of {options.meshes[0]}, experts over {options.ep_axes[0]}, divided by the row's; empty if that row "
        "failed. Times are from tokens to the last token's logits, with random weights and even routing."
    )


def _row(
    make: Callable[[], Model], seq: int, form: FormName, samples: int, gpu_seconds: _GpuSeconds, *, first: bool
) -> dict[str, Any]:
    """Measures a row. `first`: on the mesh that the others are compared with."""
    model = make()
    planner = make_planner(model, seq, form=form)
    program = compile_program(model, planner, prompt(model, planner, seq))
    timing = program.time(samples)
    used = timing.seconds * program.pages.sharding.num_devices
    if first:
        gpu_seconds[seq, form] = used
    compared = {"efficiency": gpu_seconds[seq, form] / used} if (seq, form) in gpu_seconds else {}
    return timing.row() | {"tokens_per_s": seq / timing.seconds} | compared | program.memory
