"""`host`: what the host does for a step, without the devices' part of it: the engine's schedule and text, works to arrays,
arrays to the devices, outcomes.

All works decode, each with a single token after its own context. No model is made: the devices only receive what they would
in a step of the real one.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from jax_mla_cp.batch.layout import build
from jax_mla_cp.batch.packing import pack, packed_specs
from jax_mla_cp.batch.step_request import SamplingParams, StepRequest
from jax_mla_cp.bench.engine_host import NoModel, host_seconds
from jax_mla_cp.bench.options import Options
from jax_mla_cp.bench.program import PAGE_SIZE
from jax_mla_cp.bench.table import Report
from jax_mla_cp.bench.timing import measure
from jax_mla_cp.config.model import ModelConfig
from jax_mla_cp.default_model import DIRECTORY
from jax_mla_cp.mesh import make_mesh, on_devices
from jax_mla_cp.model.build import Build
from jax_mla_cp.model.loaded_model import Model
from jax_mla_cp.step.planner import Planner
from jax_mla_cp.step.results import read_results
from jax_mla_cp.step.sampling import TOP_LOGPROBS, SamplerOutput
from jax_mla_cp.tokenizer import Tokenizer

_HOLD_MS = {64: 2.0}
_ENGINE_STEPS = 300


def run(options: Options, config: ModelConfig, report: Report) -> None:
    """Adds a row for each number of works and context."""
    mesh = make_mesh(options.mesh)
    model = Model({}, Build(config, options.mesh), mesh)
    most, longest = (max(sizes) for sizes in zip(*options.shapes, strict=True))
    planner = Planner.create(
        model,
        cache_tokens=most * -(-longest // PAGE_SIZE) * PAGE_SIZE,
        page_size=PAGE_SIZE,
        max_requests=most,
        max_len=longest,
        prefill_chunk=min(8192, longest),
    )
    for requests, context in options.shapes:
        row = report.row(
            "host time of a decode step",
            "all but the devices' time",
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
        "ms: engine + arrays + pack + outcomes. engine: schedule, works, tokens to text, events, metrics. arrays: works are checked, laid out over the ranks and made into arrays. "
        "put: two arrays to every device, and waiting for them."
    )


def _row(planner: Planner, requests: int, context: int, options: Options) -> dict[str, Any]:
    shape, model = planner.shape, planner.model
    each = -(-context // PAGE_SIZE)
    pages = np.random.default_rng(0).permutation(shape.cache.pages_per_layer)[: requests * each].reshape(requests, each)
    works = [[StepRequest([1], context - 1, pages[i].tolist(), SamplingParams(seed=i)) for i in range(requests)]]
    layouts, step = planner.lay_out(works)
    batch = build(layouts, shape, step)
    packed = pack(batch, options.mesh)
    places = shape.max_requests * shape.samples
    tops = np.zeros((places, TOP_LOGPROBS), np.int32), np.zeros((places, TOP_LOGPROBS), np.float32)
    sampled = SamplerOutput(np.zeros(places, np.int32), np.zeros(places, np.float32), *tops)
    parts: dict[str, Callable[[], Any]] = {
        "arrays_ms": lambda: planner.host_batch(works),
        "pack_ms": lambda: pack(batch, options.mesh),
        "outcomes_ms": lambda: read_results(sampled, works, layouts, batch, shape),
        "put_ms": lambda: jax.block_until_ready(on_devices(packed, packed_specs(packed), model.mesh)),
    }
    taken = {name: measure(call, samples=options.samples) for name, call in parts.items()}
    ms = {name: timing.seconds * 1e3 for name, timing in taken.items()}
    idle = NoModel(max_running=requests, prefill_chunk=8192, pages_per_group=64 * requests, page_size=PAGE_SIZE)
    tokenizer = Tokenizer.from_dir(DIRECTORY, ModelConfig.from_dir(DIRECTORY).vocab_size)
    steps = host_seconds(idle, requests=requests, steps=_ENGINE_STEPS, tokenizer=tokenizer)
    ms["engine_ms"] = float(np.median(steps)) * 1e3
    whole = sum(ms[name] for name in ("engine_ms", "arrays_ms", "pack_ms", "outcomes_ms"))
    return taken["arrays_ms"].row() | ms | {"ms": whole}
