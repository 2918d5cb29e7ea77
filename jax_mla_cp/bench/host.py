"""`host`: the host's part of a decode step: scheduling and text in the engine, making arrays, transferring them, reading results.

All requests decode, one token each after a context of its own. There is no model: the devices only receive the arrays of a
real step.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from jax_mla_cp.batch.layout import build_batch
from jax_mla_cp.batch.packing import pack
from jax_mla_cp.batch.step_request import SamplingParams, StepRequest
from jax_mla_cp.bench.bench_options import Options
from jax_mla_cp.bench.engine_host import NullRunner, host_seconds
from jax_mla_cp.bench.program import PAGE_SIZE
from jax_mla_cp.bench.table import Report
from jax_mla_cp.bench.timing import measure
from jax_mla_cp.config.model import ModelConfig
from jax_mla_cp.default_model import DIRECTORY
from jax_mla_cp.mesh import declared_specs, make_mesh, on_devices
from jax_mla_cp.model.build import Build
from jax_mla_cp.model.loaded_model import Model
from jax_mla_cp.step.planner import Planner
from jax_mla_cp.step.results import read_results
from jax_mla_cp.step.sampling import TOP_LOGPROBS, SamplerOutput
from jax_mla_cp.tokenizer import Tokenizer

_HOLD_MS = {64: 2.0}
_ENGINE_STEPS = 300


def run(options: Options, config: ModelConfig, report: Report) -> None:
    """Adds a row for each number of requests and context length."""
    mesh = make_mesh(options.mesh)
    model = Model({}, Build(config, options.mesh), mesh)
    most, longest = (max(sizes) for sizes in zip(*options.shapes, strict=True))
    planner = Planner.create(
        model,
        cache_tokens=most * -(-longest // PAGE_SIZE) * PAGE_SIZE,
        page_size=PAGE_SIZE,
        max_requests=most,
        max_model_len=longest,
        prefill_chunk=min(8192, longest),
    )
    for requests, context in options.shapes:
        row = report.row(
            "host time of a decode step",
            "host time",
            functools.partial(_row, planner, requests, context, options),
            requests=requests,
            context=context,
            mesh=str(options.mesh),
        )
        if requests in _HOLD_MS:
            report.hold(
                f"{requests} requests: host ms per step, without the transfer",
                row["ms"] if row else None,
                at_most=_HOLD_MS[requests],
            )
    report.notes.append(
        "ms: engine + arrays + pack + outcomes. engine: scheduling, detokenizing, events, metrics. arrays: checking the requests, laying "
        "them out over the ranks, making arrays. outcomes: reading the results. put: transferring two arrays to every device."
    )


def _row(planner: Planner, requests: int, context: int, options: Options) -> dict[str, Any]:
    shape, model = planner.shape, planner.model
    each = -(-context // PAGE_SIZE)
    pages = np.random.default_rng(0).permutation(shape.cache.pages_per_layer)[: requests * each].reshape(requests, each)
    groups = [[StepRequest([1], context - 1, pages[i].tolist(), SamplingParams(seed=i)) for i in range(requests)]]
    layout = planner.lay_out(groups)
    batch = build_batch(layout, shape)
    packed = pack(batch, options.mesh)
    places = shape.max_requests * shape.samples_per_request
    tops = np.zeros((places, TOP_LOGPROBS), np.int32), np.zeros((places, TOP_LOGPROBS), np.float32)
    sampled = SamplerOutput(np.zeros(places, np.int32), np.zeros(places, np.float32), *tops)
    parts: dict[str, Callable[[], Any]] = {
        "arrays_ms": lambda: planner.host_batch(groups),
        "pack_ms": lambda: pack(batch, options.mesh),
        "outcomes_ms": lambda: read_results(sampled, layout, shape),
        "put_ms": lambda: jax.block_until_ready(on_devices(packed, declared_specs(packed), model.mesh)),
    }
    taken = {name: measure(call, samples=options.samples) for name, call in parts.items()}
    ms = {name: timing.seconds * 1e3 for name, timing in taken.items()}
    idle = NullRunner(max_running=requests, prefill_chunk=8192, pages_per_group=64 * requests, page_size=PAGE_SIZE)
    tokenizer = Tokenizer.from_dir(DIRECTORY, ModelConfig.from_dir(DIRECTORY).vocab_size)
    steps = host_seconds(idle, requests=requests, steps=_ENGINE_STEPS, tokenizer=tokenizer)
    ms["engine_ms"] = float(np.median(steps)) * 1e3
    whole = sum(ms[name] for name in ("engine_ms", "arrays_ms", "pack_ms", "outcomes_ms"))
    return taken["arrays_ms"].row() | ms | {"ms": whole}
