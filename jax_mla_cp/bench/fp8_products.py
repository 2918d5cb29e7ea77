"""The experts' products of many tokens in FP8 (w8a8), beside bfloat16's, and what quantizing their rows costs."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jax_mla_cp.bench.bench_options import Options
from jax_mla_cp.bench.data import normal
from jax_mla_cp.bench.expert_products import random_matrices
from jax_mla_cp.bench.program import clean_up
from jax_mla_cp.bench.roofline import Cost
from jax_mla_cp.bench.table import Report
from jax_mla_cp.bench.timing import measure
from jax_mla_cp.model.fp8 import Matrices
from jax_mla_cp.model.fp8_rows import quantize_rows
from jax_mla_cp.model.grouped_matmul import grouped_matmul, has_kernels, resolve_grouped_matmul
from jax_mla_cp.model.quantize import quantize

_HOLD_TFLOPS = 1000
_HOLD_SPEEDUP = 1.45
_HOLD_QUANTIZATION = 0.14


def fp8_rows(
    options: Options,
    report: Report,
    table: str,
    facts: dict[str, Any],
    what: str,
    k: int,
    n: int,
    sizes: dict[str, np.ndarray],
    bf16_ms: dict[str, float | None],
    *,
    held: bool,
) -> None:
    """Adds rows of a product [M, K] x [N, K], M the sum of each of `sizes`.

    Args:
      bf16_ms: the time of the same product in bfloat16, by the name of its sizes.
      held: compare with the numbers to hold.
    """
    facts = facts | {"weights": "fp8, w8a8"}
    m = int(next(iter(sizes.values())).sum())
    flops = 2.0 * m * k * n

    def timed(name: str, make: Callable[[], Callable[[], Any]], cost: Cost, peak: float | None) -> float | None:
        def run() -> dict[str, Any]:
            timing = measure(make(), samples=options.samples)
            assert report.ceilings is not None
            ceilings = report.ceilings if peak is None else dataclasses.replace(report.ceilings, matmul=peak)
            return timing.row() | cost.row(timing.seconds, ceilings)

        row = report.row(table, name, run, **facts)
        clean_up()
        return row["ms"] if row else None

    dense = timed(f"dense product in FP8 without scales, {what}: its peak", lambda: _dense(m, k, n), Cost(flops), None)
    peak = flops / dense * 1e3 if dense else None
    for name, counts in sizes.items():
        moved = m * (k + 2 * n) + len(counts) * k * n
        make = functools.partial(_grouped, options, m, k, n, counts)
        ms = timed(f"grouped in FP8, {what}, {name}", make, Cost(flops, moved=float(moved)), peak)
        if held:
            reached, plain = flops / ms * 1e-9 if ms else None, bf16_ms.get(name)
            report.hold(f"grouped in FP8, {what}, {name}: TFLOP/s", reached, at_least=_HOLD_TFLOPS)
            times = plain / ms if plain and ms else None
            report.hold(f"grouped in FP8, {what}, {name}: times bfloat16's speed", times, at_least=_HOLD_SPEEDUP)
    x = functools.partial(normal, 0, (m, k), options.dtype)
    ms = timed(f"quantizing the rows, {what}", lambda: _quantize(x()), Cost(moved=float(3 * m * k)), None)
    if held:
        share = ms / dense if ms and dense else None
        report.hold(f"quantizing the rows, {what}: of a dense product in FP8", share, at_most=_HOLD_QUANTIZATION)


def _dense(m: int, k: int, n: int) -> Callable[[], Any]:
    a, b = (_as_float8(normal(seed, shape, jnp.uint8, 60.0)) for seed, shape in enumerate([(m, k), (n, k)]))

    @jax.jit
    def program(a: jax.Array, b: jax.Array) -> jax.Array:
        return lax.dot_general(a, b, (((1,), (1,)), ((), ())), preferred_element_type=jnp.bfloat16)

    return lambda: program(a, b)


def _as_float8(x: jax.Array) -> jax.Array:
    return lax.bitcast_convert_type(x, jnp.float8_e4m3fn)


def _grouped(options: Options, m: int, k: int, n: int, counts: np.ndarray) -> Callable[[], Any]:
    rows = jax.jit(quantize_rows)(normal(0, (m, k), options.dtype))
    weights: Matrices = random_matrices(options, len(counts), "fp8", 1, n, k)
    program = jax.jit(functools.partial(grouped_matmul, implementation=resolve_grouped_matmul()))
    placed = jnp.asarray(counts)
    return lambda: program(rows, weights, placed)


def _quantize(x: jax.Array) -> Callable[[], Any]:
    program = jax.jit(functools.partial(quantize, kernels=has_kernels(resolve_grouped_matmul())))
    return lambda: program(x)
