"""The parts of a rank's MLA layer, each a program of its own at the layer's shapes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_mla_cp import cache
from jax_mla_cp.batch.shapes import CacheShape
from jax_mla_cp.bench import kernels
from jax_mla_cp.bench.bench_options import FormName, Options
from jax_mla_cp.bench.data import normal
from jax_mla_cp.bench.mock import noise
from jax_mla_cp.bench.program import PAGE_SIZE
from jax_mla_cp.bench.roofline import Cost, attention_bytes, attention_flops, rank_rows
from jax_mla_cp.bench.table import Report
from jax_mla_cp.bench.timing import measure
from jax_mla_cp.config.model import ModelConfig
from jax_mla_cp.model.grouped_matmul import resolve_grouped_matmul
from jax_mla_cp.model.mla import up_project


@dataclasses.dataclass(frozen=True)
class Part:
    """A part of a layer: its minimal cost, and a function that makes the call to time."""

    name: str
    cost: Cost
    make: Callable[[], Callable[[], Any]]
    use_measured_time: bool = False
    """Its measured time, not its roofline, counts in the layer's sum of rooflines."""


def time_part(options: Options, report: Report, part: Part) -> dict[str, Any]:
    timing = measure(part.make(), samples=options.samples)
    return timing.row() | report.beside_roof(part.cost, timing.seconds)


def mla_parts(options: Options, config: ModelConfig, seq: int, form: FormName) -> list[Part]:
    c, cp = config, options.mesh.cp
    heads, tokens = c.num_heads // options.mesh.tp, seq // cp
    dim = c.qk_nope_head_dim + c.qk_rope_head_dim
    low = c.q_lora_rank
    dtype = options.dtype
    parts = [] if low is None else [product(options, "q_a", tokens, c.hidden_size, low)]
    parts += [
        product(options, "q_b", tokens, low or c.hidden_size, heads * dim),
        product(options, "kv_a", tokens, c.hidden_size, c.latent_dim),
        Part(
            "gather (mocked: own part and random numbers)",
            _copied(seq * c.latent_dim),
            lambda: _gather(options, c, tokens),
        ),
        Part("cache write", _copied(seq * c.latent_dim), lambda: _write(options, c, seq)),
    ]
    rows, pairs = rank_rows(seq, cp, 0)
    implementation = kernels.resolve(options, config)
    cost = Cost(
        flops=attention_flops(form, c, pairs, heads),
        moved=attention_bytes(form, c, int(rows.cu_q[-1]), int(rows.kv_len.max()), heads),
    )
    name = kernels.name(implementation, form)
    if form == "expanded":
        up = 2.0 * seq * c.kv_lora_rank * heads * (c.qk_nope_head_dim + c.v_head_dim)
        written = 2.0 * seq * (c.latent_dim + heads * (dim + c.v_head_dim))

        def attend() -> Callable[[], Any]:
            q = normal(0, (int(rows.cu_q[-1]), heads, dim), dtype)
            kv = normal(1, (seq, heads, dim + c.v_head_dim), dtype)
            kernel, placed = kernels.expanded(implementation, c.softmax_scale), jax.device_put(rows)
            return lambda: kernel(q, kv, placed)

        parts += [
            Part("page read", _copied(seq * c.latent_dim), lambda: _read(options, c, seq)),
            Part("up-projection", Cost(flops=up, moved=written), lambda: _up_project(options, c, seq, heads)),
            Part(name, cost, attend, use_measured_time=True),
        ]
    else:

        def attend() -> Callable[[], Any]:
            count, width = int(rows.cu_q[-1]), -(-seq // PAGE_SIZE)
            q_latent = normal(0, (heads, count, c.kv_lora_rank), dtype)
            q_rope = normal(1, (count, heads, c.qk_rope_head_dim), dtype)
            pages = normal(2, (width, PAGE_SIZE, c.latent_dim), dtype)
            order = np.random.default_rng(0).permutation(width).astype(np.int32)
            pages_of_rows = jnp.asarray(np.tile(order, (len(rows.kv_len), 1)))
            kernel, placed = jax.jit(kernels.absorbed(implementation, c.softmax_scale)), jax.device_put(rows)
            return lambda: kernel(q_latent, q_rope, pages, pages_of_rows, placed)

        parts += [
            _batched(options, c, "q times W_UK", "tnh,nhR->ntR", tokens, heads, c.qk_nope_head_dim, c.kv_lora_rank),
            Part(name, cost, attend, use_measured_time=True),
            _batched(options, c, "output times W_UV", "ntR,nvR->tnv", tokens, heads, c.kv_lora_rank, c.v_head_dim),
        ]
    return [*parts, product(options, "o", tokens, heads * c.v_head_dim, c.hidden_size)]


def _copied(numbers: int) -> Cost:
    """The cost of reading and writing numbers of 2 bytes each."""
    return Cost(moved=4.0 * numbers)


def product(options: Options, name: str, rows: int, k: int, n: int) -> Part:
    def make() -> Callable[[], Any]:
        a, b = normal(0, (rows, k), options.dtype), normal(1, (n, k), options.dtype)
        program = jax.jit(lambda a, b: jnp.einsum("tk,nk->tn", a, b))
        return lambda: program(a, b)

    return Part(name, Cost(flops=2.0 * rows * k * n, moved=2.0 * (rows * k + k * n + rows * n)), make)


def _batched(
    options: Options, config: ModelConfig, name: str, subscripts: str, tokens: int, heads: int, k: int, n: int
) -> Part:
    """A matmul per head, with which the absorbed form folds in the up-projections."""

    def make() -> Callable[[], Any]:
        sizes = {
            "t": tokens,
            "n": heads,
            "h": config.qk_nope_head_dim,
            "R": config.kv_lora_rank,
            "v": config.v_head_dim,
        }
        operands = subscripts.split("->")[0].split(",")
        a, b = (normal(i, tuple(sizes[letter] for letter in term), options.dtype) for i, term in enumerate(operands))
        program = jax.jit(lambda a, b: jnp.einsum(subscripts, a, b))
        return lambda: program(a, b)

    cost = Cost(flops=2.0 * tokens * heads * k * n, moved=2.0 * heads * (tokens * (k + n) + k * n))
    return Part(name, cost, make)


def _gather(options: Options, config: ModelConfig, tokens: int) -> Callable[[], Any]:
    local = normal(0, (tokens, config.latent_dim), options.dtype)
    cp = options.mesh.cp

    def gather(local: jax.Array) -> jax.Array:
        others = noise((cp * tokens, config.latent_dim), local.dtype)
        return jax.lax.dynamic_update_slice_in_dim(others, local, 0, 0)

    program = jax.jit(gather)
    return lambda: program(local)


def _write(options: Options, config: ModelConfig, seq: int) -> Callable[[], Any]:
    shape = CacheShape(1, -(-seq // PAGE_SIZE), PAGE_SIZE)
    latents = normal(0, (seq, config.latent_dim), options.dtype)
    rng = np.random.default_rng(0)
    order = rng.permutation(shape.pages_per_layer)[:, None]
    slots = jnp.asarray(shape.slot_of(order, np.arange(PAGE_SIZE)).ravel()[:seq])
    pages_to_zero = jnp.asarray(shape.unused_pages(2))  # as many as layout.py's at least
    program = jax.jit(
        lambda pages, latents, slots: cache.write(
            pages, latents, slots, pages_to_zero, jnp.int32(0), layers=shape.layers
        ),
        donate_argnums=0,
    )
    pages = normal(1, (shape.total_pages, PAGE_SIZE, config.latent_dim), options.dtype)

    def call() -> jax.Array:
        nonlocal pages
        pages = program(pages, latents, slots)
        return pages

    return call


def _read(options: Options, config: ModelConfig, seq: int) -> Callable[[], Any]:
    width = -(-seq // PAGE_SIZE)
    pages = normal(0, (width, PAGE_SIZE, config.latent_dim), options.dtype)
    ids = jnp.asarray(np.random.default_rng(0).permutation(width).astype(np.int32))
    program = jax.jit(cache.read)
    return lambda: program(pages, ids)


def _up_project(options: Options, config: ModelConfig, seq: int, heads: int) -> Callable[[], Any]:
    c = config
    latents = normal(0, (seq, c.latent_dim), options.dtype)
    w_uk = normal(1, (heads, c.qk_nope_head_dim, c.kv_lora_rank), options.dtype)
    w_uv = normal(2, (heads, c.v_head_dim, c.kv_lora_rank), options.dtype)
    program, num_keys = jax.jit(up_project, static_argnums=4), jnp.array([seq], jnp.int32)
    implementation = resolve_grouped_matmul()
    return lambda: program(latents, num_keys, w_uk, w_uv, implementation)
