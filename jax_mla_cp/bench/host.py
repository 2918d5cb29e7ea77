"""`host`: the host's part of a decode step: scheduling and text in the engine, making arrays, transferring them, reading results.

All requests decode, one token each after a context of its own. There is no model: the devices only receive the arrays of a
real step. With several processes, the others' connections and messages are real too (bench/followers.py).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from jax_mla_cp.batch.arrays import Batch
from jax_mla_cp.batch.layout import build_batch
from jax_mla_cp.batch.packing import DeviceBatch, pack
from jax_mla_cp.batch.page_table import TableMirror
from jax_mla_cp.bench.bench_options import Options
from jax_mla_cp.bench.engine_host import NullRunner, host_seconds
from jax_mla_cp.bench.followers import leading
from jax_mla_cp.bench.host_step import decoding, make_planner
from jax_mla_cp.bench.program import PAGE_SIZE
from jax_mla_cp.bench.send import message_bytes, time_sends
from jax_mla_cp.bench.table import Report
from jax_mla_cp.bench.timing import measure
from jax_mla_cp.config.model import ModelConfig
from jax_mla_cp.default_model import DIRECTORY
from jax_mla_cp.distributed.leader import Leader
from jax_mla_cp.mesh import declared_specs, make_mesh, on_devices
from jax_mla_cp.step.inputs import StepInputs
from jax_mla_cp.step.logit_bias import HostBias
from jax_mla_cp.step.planner import Planner
from jax_mla_cp.step.results import read_results
from jax_mla_cp.step.sampling import TOP_LOGPROBS, SamplerOutput
from jax_mla_cp.tokenizer import Tokenizer

_HOLD_MS = {64: 2.0}
_HOLD_MORE_MS = {64: 0.3}
"""Several processes, more than one."""
_HOLD_HEADER_BYTES = 4096
_HOLD_BYTES = {(64, 128 * 1024): 64 * 1024}
_ENGINE_STEPS = 300


def run(options: Options, config: ModelConfig, report: Report) -> None:
    """Adds a row for each number of requests and context length.

    Raises:
      ConfigError: another process did not start.
    """
    planner = make_planner(options, config, make_mesh(options.mesh))
    headers: list[int] = []
    with leading(options) as leader:
        for requests, context in options.shapes:
            row = report.row(
                "host time of a decode step",
                "host time",
                functools.partial(_row, planner, requests, context, options, leader),
                requests=requests,
                context=context,
                mesh=str(options.mesh),
                processes=options.processes,
            )
            if requests in _HOLD_MS:
                report.hold(
                    f"{requests} requests: host ms per step, without the transfer",
                    row["ms"] if row else None,
                    at_most=_HOLD_MS[requests],
                )
            if (requests, context) in _HOLD_BYTES:
                report.hold(
                    f"{requests} requests of {context} tokens: bytes to the devices per step",
                    row["bytes"] if row else None,
                    at_most=_HOLD_BYTES[requests, context],
                )
            if requests in _HOLD_MORE_MS and leader is not None:
                report.hold(
                    f"{requests} requests: host ms that other processes add, send + echo",
                    row["send_ms"] + row["echo_ms"] if row else None,
                    at_most=_HOLD_MORE_MS[requests],
                )
            if row and leader is not None:
                headers.append(row["message_bytes"] - row["arrays_bytes"])
    report.notes.append(
        "ms: engine + arrays + pack + outcomes. engine: scheduling, detokenizing, events, metrics. arrays: checking the requests, laying "
        "them out over the ranks, making arrays. outcomes: reading the results. put: transferring two arrays to every device. bytes: "
        "their size, before they are replicated; the page table is on the devices already."
    )
    if leader is not None:
        report.hold("bytes of a message beside its arrays", max(headers, default=None), at_most=_HOLD_HEADER_BYTES)
        report.notes.append(
            "send: making, encoding and sending the message; ms includes it. echo: processor time of the threads that handle the echoes, "
            "while the devices work. send masks: as send, when every request has a mask. The other processes share this host's processors."
        )


def _row(planner: Planner, requests: int, context: int, options: Options, leader: Leader | None) -> dict[str, Any]:
    shape, model = planner.shape, planner.model
    groups = decoding(planner, requests, context)
    mirror = TableMirror(shape)

    def build() -> Batch:
        layout = planner.lay_out(groups)
        return build_batch(layout, shape, mirror.update(layout.columns, layout.step))

    layout = planner.lay_out(groups)
    mirror.apply(mirror.update(layout.columns, layout.step))  # as the steps before would have
    batch, update = build(), mirror.update(layout.columns, layout.step)
    packed = pack(batch, options.mesh)
    inputs = StepInputs(layout.step, packed, None, update.whole, update.checksum)
    places = shape.max_requests * shape.samples_per_request
    tops = np.zeros((places, TOP_LOGPROBS), np.int32), np.zeros((places, TOP_LOGPROBS), np.float32)
    sampled = SamplerOutput(np.zeros(places, np.int32), np.zeros(places, np.float32), *tops)
    parts: dict[str, Callable[[], Any]] = {
        "arrays_ms": build,
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
    sent = {} if leader is None else _sent(leader, inputs, planner, requests)
    whole = sum((ms | sent).get(name, 0.0) for name in ("engine_ms", "arrays_ms", "pack_ms", "outcomes_ms", "send_ms"))
    return taken["arrays_ms"].row() | ms | sent | {"bytes": _bytes(packed), "ms": whole}


def _sent(leader: Leader, inputs: StepInputs, planner: Planner, requests: int) -> dict[str, float]:
    """Columns of what the other processes add."""
    shape = planner.shape
    places = shape.dp * shape.max_requests * shape.samples_per_request
    mask = np.full((places, -(-planner.model.config.vocab_size // 32)), 0xFFFFFFFF, np.uint32)
    masked = dataclasses.replace(inputs, bias=HostBias(np.arange(places) < requests, mask, None))
    time, masked_time = time_sends(leader, inputs), time_sends(leader, masked)
    return {
        "send_ms": time.send * 1e3,
        "echo_ms": time.echo * 1e3,
        "send_masks_ms": masked_time.send * 1e3,
        "message_bytes": message_bytes(inputs),
        "arrays_bytes": _bytes(inputs.batch) + inputs.table_checksum.nbytes,
    }


def _bytes(batch: DeviceBatch) -> int:
    return sum(array.nbytes for array in jax.tree.leaves(batch))
