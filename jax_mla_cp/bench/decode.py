"""`decode`: decode attention over batch, context and heads; with --full, the model's whole decode step.

A program has one call per region of the cache ("layer"). The regions take several GB, so that no call finds another's data in
the L2 cache. Each call's page ids depend on the output of the call before, as with a model's layers: XLA can neither merge the
calls nor run them concurrently.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jax_mla_cp.attention import Resolved, fa3
from jax_mla_cp.batch.rows import Rows
from jax_mla_cp.bench import kernels
from jax_mla_cp.bench.bench_options import EpName, Options, WeightsKind
from jax_mla_cp.bench.data import normal
from jax_mla_cp.bench.mock import MockBuild
from jax_mla_cp.bench.program import (
    PAGE_SIZE,
    clean_up,
    compile_program,
    make_build,
    make_model,
    make_planner,
    prompt,
    with_layers,
)
from jax_mla_cp.bench.random_weights import favor_first_rank
from jax_mla_cp.bench.roofline import Cost, attention_flops
from jax_mla_cp.bench.table import Report
from jax_mla_cp.bench.timing import Timing, measure
from jax_mla_cp.config.model import ModelConfig
from jax_mla_cp.mesh import TP, make_mesh
from jax_mla_cp.model.loaded_model import expert_bytes, weight_bytes

_CACHE_BYTES = 5e9  # of all regions
_LEAST_BYTES = 1e9
_MOST_REGIONS = 16
_HOLD_TBS = {(64, 8192): 3.1, (8, 131072): 3.5}
_HELD_HEADS = 16


def run(options: Options, config: ModelConfig, report: Report) -> None:
    """Adds the rows."""
    implementation = kernels.resolve(options, config)
    report.notes.append(
        "GB/s counts each request's latents once per call, whatever the number of heads; its ceiling is the read bandwidth. "
        f"Pages of {PAGE_SIZE} tokens are in random order. As in the model, up to {fa3.DECODE_TOKENS} tokens run in mla_decode "
        "(keys split over the GPU), more in mla_prefill_absorbed."
    )
    for heads in options.heads:
        for tokens in options.tokens:
            for requests, context in options.shapes:
                _attention_row(options, config, report, implementation, requests, context, heads, tokens)
    if options.full:
        for ep, weights in itertools.product(options.ep_axes, options.weights_kinds):
            for requests, context in options.shapes:
                _step_rows(options, config, report, requests, context, ep, weights)


def _attention_row(
    options: Options,
    config: ModelConfig,
    report: Report,
    implementation: Resolved,
    requests: int,
    context: int,
    heads: int,
    tokens: int,
) -> None:
    decode = requests * tokens <= fa3.DECODE_TOKENS
    kernel = implementation if implementation == "xla" else "mla_decode" if decode else "mla_prefill_absorbed"

    def measured() -> dict[str, Any]:
        program, operands, calls = _program(config, options, implementation, requests, context, heads, tokens)
        timing = measure(lambda: program(*operands), samples=options.samples)
        pairs = requests * (tokens * context - tokens * (tokens - 1) // 2)
        cost = Cost(
            flops=attention_flops("absorbed", config, pairs, heads),
            read=2.0 * requests * context * config.latent_dim,
        )
        seconds = timing.seconds / calls
        return timing.row() | {"ms": seconds * 1e3, "us": seconds * 1e6} | report.beside_roof(cost, seconds)

    facts = {"requests": requests, "context": context, "tokens": tokens, "heads": heads, "dtype": options.dtype}
    row = report.row("decode attention, one layer", kernel, measured, **facts)
    if heads == _HELD_HEADS and tokens == 1 and (requests, context) in _HOLD_TBS and config.latent_dim == 576:
        report.hold(
            f"decode, {requests} requests x {context}, {heads} heads: cache read, TB/s",
            row["gbs"] / 1e3 if row else None,
            at_least=_HOLD_TBS[requests, context],
        )
    clean_up()


def _program(
    config: ModelConfig,
    options: Options,
    implementation: Resolved,
    requests: int,
    context: int,
    heads: int,
    tokens: int,
) -> tuple[Any, tuple[Any, ...], int]:
    """Returns the jitted program, its operands, and the number of calls in it."""
    c = config
    width = -(-context // PAGE_SIZE)
    each = requests * width  # pages of a region
    region_bytes = 2 * each * PAGE_SIZE * c.latent_dim
    limit = _CACHE_BYTES if options.platform == "cuda" else 4 * region_bytes
    regions = max(2, min(_MOST_REGIONS, int(limit // region_bytes)))
    if options.platform == "cuda" and regions * region_bytes < _LEAST_BYTES:
        regions = int(-(-_LEAST_BYTES // region_bytes))
    # Made in place: the operands of a decode step are far smaller than the cache.
    pages = normal(0, (regions * each, PAGE_SIZE, c.latent_dim), options.dtype)
    q_latent = normal(1, (heads, requests * tokens, c.kv_lora_rank), options.dtype)
    q_rope = normal(2, (requests * tokens, heads, c.qk_rope_head_dim), options.dtype)
    table = np.random.default_rng(0).permutation(each).astype(np.int32).reshape(requests, width)
    rows = Rows(
        cu_q=np.arange(requests + 1, dtype=np.int32) * np.int32(tokens),
        kv_len=np.full(requests, context, np.int32),
        kv_start=np.zeros(requests, np.int32),
        request=np.arange(requests, dtype=np.int32),
    )
    kernel = kernels.absorbed(implementation, c.softmax_scale, decode=requests * tokens <= fa3.DECODE_TOKENS)

    @jax.jit
    def program(q_latent: jax.Array, q_rope: jax.Array, pages: jax.Array, table: jax.Array, rows: Rows) -> jax.Array:
        # 0, but XLA can't know that: the outputs are numbers.
        after = jnp.int32(0)
        out = q_latent
        for region in range(regions):
            out = kernel(q_latent, q_rope, pages, table + (region * each + after), rows)
            after = jnp.isnan(out[0, 0, 0]).astype(jnp.int32)
        return out

    return program, jax.device_put((q_latent, q_rope, pages, table, rows)), regions


def _step_rows(
    options: Options,
    config: ModelConfig,
    report: Report,
    requests: int,
    context: int,
    ep: EpName,
    weights: WeightsKind,
) -> None:
    """Adds rows of the model's decode step: dense layers and a few MoE layers run; the others are extrapolated."""
    moe = options.layers or 4
    dense = config.num_dense_layers

    def build(moe_layers: int) -> MockBuild:
        part = with_layers(config, dense, moe_layers, context + 64)
        return make_build(part, options.mesh, ep, options.dtype, options.attention, weights)

    # In the first row, so that a failure is a row.
    timed = functools.cache(lambda: tuple(_time_step(options, build(n), requests, context) for n in (1, 1 + moe)))

    def row(*, skewed: bool) -> dict[str, Any]:
        one, more = timed()
        first, last = (step.skewed if skewed else step.random for step in (one, more))
        each = (last.seconds - first.seconds) / moe
        total = first.seconds + (config.num_moe_layers - 1) * each
        cost = _step_cost(build(config.num_moe_layers), requests, context, skewed=skewed)
        return (
            last.row() | {"moe_layer_us": each * 1e6, "ms": total * 1e3} | report.beside_roof(cost, total) | more.memory
        )

    table = "decode step, whole model: inter-token latency (compute)"
    facts = {"requests": requests, "context": context, "mesh": str(options.mesh), "ep_axes": ep}
    facts |= {"dtype": options.dtype, "weights": str(weights)}
    if report.row(table, "random routing", functools.partial(row, skewed=False), **facts):
        report.row(table, "all tokens to this rank's experts", functools.partial(row, skewed=True), **facts)
    clean_up()
    note = (
        f"decode step: {dense} dense layers run with 1 and with {1 + moe} MoE layers; ms extrapolates to {config.num_layers} layers, "
        "without the collectives, which are mocked. Requests share no pages; pages are in random order. roof ms: reading the weights, "
        "of the experts only those that have tokens (with random routing, in the mean), and the requests' latents."
    )
    if note not in report.notes:
        report.notes.append(note)


class _TimedStep(NamedTuple):
    """Times of a decode step, with random routing and with all tokens to this rank's experts, and the program's memory."""

    random: Timing
    skewed: Timing
    memory: dict[str, float]


def _time_step(options: Options, build: MockBuild, requests: int, context: int) -> _TimedStep:
    mesh = make_mesh(options.mesh)
    model = make_model(build, mesh)
    planner = make_planner(model, context, requests=requests)
    program = compile_program(model, planner, prompt(model, planner, 1, context - 1, requests))
    random = program.time(options.samples)
    program.model = dataclasses.replace(model, params=favor_first_rank(model.params, build, mesh))
    timed = _TimedStep(random, program.time(options.samples), program.memory)
    del model, program
    clean_up()
    return timed


def _step_cost(build: MockBuild, requests: int, context: int, *, skewed: bool) -> Cost:
    """The bytes that a decode step of one device reads at least; the embedding's are few."""
    c = build.config
    local = build.padded_experts // build.axes.size(build.ep_axes)
    chosen, of = (min(c.experts_per_token, local), local) if skewed else (c.experts_per_token, c.n_routed_experts)
    # Without a bias all tokens are given the same experts (`favor_first_rank`), as if there were one.
    draws = 1 if skewed and not c.routing_bias else requests
    untouched = (1 - chosen / of) ** draws
    embedding = build.padded_vocab // build.axes.size(TP) * c.hidden_size * build.dtype.itemsize
    weights = weight_bytes(build) - embedding - expert_bytes(build) * untouched
    return Cost(read=weights + c.num_layers * requests * context * c.latent_dim * build.dtype.itemsize)
