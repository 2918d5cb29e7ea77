"""`engine`: decode steps of the whole engine, in process, with real collectives: its scheduler, the host's part, the model.

All requests of a row decode together. With `ahead` the engine dispatches a step before it has read the one before, as a server
does; without, as with --no-overlap: the difference is the host's part of a step, as far as the device hides it.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
from jax.sharding import Mesh

from jax_mla_cp.bench.bench_options import Options
from jax_mla_cp.bench.engine_run import all_decoding, run_requests
from jax_mla_cp.bench.mock import MockBuild
from jax_mla_cp.bench.program import PAGE_SIZE, clean_up, make_build, make_model
from jax_mla_cp.bench.table import Report
from jax_mla_cp.config.model import ModelConfig
from jax_mla_cp.engine.engine import Engine
from jax_mla_cp.engine.observer import Observer, StepReport
from jax_mla_cp.mesh import make_mesh
from jax_mla_cp.step.planner import Planner
from jax_mla_cp.step.runner import Runner

_WARMUP_STEPS = 16
_STEPS = 128


class _Steps(Observer):
    """Keeps the reports of all steps."""

    def __init__(self) -> None:
        self.reports: list[StepReport] = []

    def step(self, report: StepReport) -> None:
        self.reports.append(report)


def run(options: Options, config: ModelConfig, report: Report) -> None:
    """Adds two rows for each mesh, kind of weights, number of requests and context: ahead, and not.

    Raises:
      ConfigError: a mesh that needs more devices than there are, or that can't divide the model.
    """
    ep = options.ep_axes[0]
    builds = [
        (make_mesh(mesh), weights, make_build(config, mesh, ep, options.dtype, options.attention, weights))
        for mesh, weights in itertools.product(options.meshes, options.weights_kinds)
    ]
    for mesh, weights, build in builds:
        # In the first row, so that a failure is a row.
        make = functools.cache(functools.partial(_make_runner, options, build, mesh))
        for (requests, context), ahead in itertools.product(options.shapes, (True, False)):
            report.row(
                f"decode step of the engine, {options.model}",
                "ahead" if ahead else "not ahead",
                functools.partial(_row, make, requests, context, ahead=ahead),
                requests=requests,
                context=context,
                mesh=str(build.shape),
                ep_axes=ep,
                dtype=options.dtype,
                weights=str(weights),
            )
        make.cache_clear()
        clean_up()
    report.notes.append(
        f"ms: the median of {_STEPS} steps, from a step's last event to the next one's, without HTTP and text. host ms: the part of it "
        "outside the runner. run ahead: the part of the steps that were dispatched before the one before was read. Weights and "
        f"prompts are random, requests share no pages, prompts are prefilled in chunks of {options.chunk} tokens."
    )


def _make_runner(options: Options, build: MockBuild, mesh: Mesh) -> Runner:
    """A runner for the largest of the rows."""
    lengths = [context + _output(requests, context, options.chunk) for requests, context in options.shapes]
    requests = [requests for requests, _ in options.shapes]
    pages = max(n * -(-length // PAGE_SIZE) for n, length in zip(requests, lengths, strict=True))
    longest, chunk = max(lengths), min(options.chunk, max(lengths))
    planner = Planner.create(
        make_model(build, mesh),
        cache_tokens=pages * PAGE_SIZE,
        page_size=PAGE_SIZE,
        max_requests=max(requests),
        max_model_len=longest,
        prefill_chunk=chunk,
    )
    return Runner(planner, prefill_chunk=chunk, max_running=max(requests), max_model_len=longest)


def _output(requests: int, context: int, chunk: int) -> int:
    """Tokens that each request generates: those that were prefilled first still decode while the last one is measured."""
    return _WARMUP_STEPS + _STEPS + 2 + -(-requests * context // chunk)


def _row(make: Callable[[], Runner], requests: int, context: int, *, ahead: bool) -> dict[str, Any]:
    runner, steps = make(), _Steps()
    vocabulary = runner.planner.model.config.vocab_size
    prompts = np.random.default_rng(0).integers(0, vocabulary, (requests, context)).tolist()
    run_requests(
        Engine(runner, observer=steps, overlap=ahead), prompts, _output(requests, context, runner.prefill_chunk)
    )
    measured = all_decoding(steps.reports, requests)[_WARMUP_STEPS:][:_STEPS]
    if len(measured) < _STEPS:
        raise RuntimeError(f"only {len(measured)} steps had all requests decoding; expected {_STEPS}.")
    seconds = [r.seconds for r in measured]
    return {
        "n": len(measured),
        "ms": float(np.median(seconds)) * 1e3,
        "p90_ms": float(np.quantile(seconds, 0.9)) * 1e3,
        "host_ms": float(np.median([r.host_seconds for r in measured])) * 1e3,
        "run_ahead": sum(r.overlapped for r in measured) / len(measured),
    }
