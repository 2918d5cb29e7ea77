"""The experts' two products of few tokens, beside the bytes of the experts that have tokens.

A program runs the products of several layers, each with the weights of its own, as a decode step does: one layer's touched experts
may fit the L2 cache, several layers' don't.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_mla_cp.bench.bench_options import Options, WeightsName
from jax_mla_cp.bench.data import normal
from jax_mla_cp.bench.program import FP8_FORMAT, clean_up
from jax_mla_cp.bench.roofline import Cost
from jax_mla_cp.bench.table import Report
from jax_mla_cp.bench.timing import measure
from jax_mla_cp.config.model import ModelConfig
from jax_mla_cp.model.fp8 import Matrices, ScaledMatrices
from jax_mla_cp.model.grouped_matmul import grouped_matmul, resolve_grouped_matmul

FEW_TOKENS = 8192
"""Prompts of more tokens multiply more than they read: their products are rows of `moe_parts`."""
_STACK_BYTES = 20e9
_MOST_LAYERS = 16
_HOLD_FEW = 0.92


def product_row(options: Options, config: ModelConfig, report: Report, seq: int, weights: WeightsName) -> None:
    """Adds a row of both products and silu for a cp rank's tokens of `seq`, routed randomly, of a tp rank's experts."""
    c, tokens = config, seq // options.mesh.cp
    local = max(1, c.n_routed_experts // options.mesh.tp)
    counts = np.bincount(choices(c, tokens).ravel(), minlength=c.n_routed_experts)[:local].astype(np.int32)
    counts[0] = max(counts[0], 1)  # of one token a rank has one expert in the mean, and at times none
    touched = int((counts > 0).sum())
    itemsize = 1 if weights == "fp8" else jnp.dtype(options.dtype).itemsize
    expert = 3 * c.hidden_size * c.moe_intermediate_size * itemsize

    def measured() -> dict[str, Any]:
        limit = _STACK_BYTES if options.platform == "cuda" else 2 * local * expert
        layers = max(2, min(_MOST_LAYERS, int(limit // (local * expert))))
        program = _program(options, c, counts, layers, weights)
        timing = measure(program, samples=options.samples)
        seconds = timing.seconds / layers
        row = timing.row() | {"ms": seconds * 1e3, "touched": touched}
        return row | report.beside_roof(Cost(read=float(touched * expert)), seconds)

    row = report.row(
        f"MoE layer's parts, {seq} tokens",
        "both products, of the touched experts",
        measured,
        seq=seq,
        mesh=str(options.mesh),
        ep_axes="tp",
        dtype=options.dtype,
        weights=weights,
    )
    if c.hidden_size == 7168 and tokens in (32, 128):
        seen = row["fraction"] if row else None
        report.hold(f"experts' products, {tokens} tokens, {weights}: of the read bandwidth", seen, at_least=_HOLD_FEW)
    clean_up()


def choices(config: ModelConfig, tokens: int) -> np.ndarray:
    """Chooses different experts for each token, uniformly: int32 [T, k], in ascending order."""
    rng = np.random.default_rng(0)
    out = np.empty((tokens, config.experts_per_token), np.int32)
    for first in range(0, tokens, 8192):
        scores = rng.random((min(8192, tokens - first), config.n_routed_experts), np.float32)
        out[first : first + 8192] = np.argpartition(scores, config.experts_per_token - 1, axis=1)[
            :, : config.experts_per_token
        ]
    return np.sort(out, -1)


def both_products(
    x: jax.Array, gate_up: Matrices, down: Matrices, sizes: jax.Array, first: jax.Array | int = 0
) -> jax.Array:
    """The products of rows sorted by expert, those of expert 0 with matrix `first`."""
    multiply = functools.partial(grouped_matmul, implementation=resolve_grouped_matmul())
    gate, up = jnp.split(multiply(x, gate_up, sizes, first), 2, axis=-1)
    return multiply(jax.nn.silu(gate) * up, down, sizes, first)


def _program(options: Options, config: ModelConfig, counts: np.ndarray, layers: int, weights: WeightsName) -> Any:
    c, local = config, len(counts)
    matrices = functools.partial(random_matrices, options, layers * local, weights)
    gate_up = matrices(1, 2 * c.moe_intermediate_size, c.hidden_size)
    down = matrices(2, c.hidden_size, c.moe_intermediate_size)

    @jax.jit
    def program(x: jax.Array, gate_up: Matrices, down: Matrices, sizes: jax.Array) -> jax.Array:
        out, after = x, jnp.int32(0)
        for layer in range(layers):
            out = both_products(x, gate_up, down, sizes, layer * local + after)
            # 0, but XLA can't know that: the outputs are numbers.
            after = jnp.isnan(out[0, 0]).astype(jnp.int32)
        return out

    operands = normal(0, (int(counts.sum()), c.hidden_size), options.dtype), gate_up, down, jnp.asarray(counts)
    return lambda: program(*operands)


def random_matrices(options: Options, count: int, weights: WeightsName, seed: int, n: int, k: int) -> Matrices:
    """Random matrices of N(0, 1 / k)."""
    if weights == "bf16":
        return normal(seed, (count, n, k), options.dtype, k**-0.5)
    spread = 100.0  # of the values, so that they use e4m3's range
    scales = jnp.full((count, *FP8_FORMAT.scales((n, k))), k**-0.5 / spread, jnp.float32)
    return ScaledMatrices(
        normal(seed, (count, n, k), jnp.uint8, spread), scales, FP8_FORMAT.block, np.dtype(options.dtype)
    )
