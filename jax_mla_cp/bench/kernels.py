"""The attention calls to time: FlashAttention-3 or XLA."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax

from jax_mla_cp.attention import Resolved, attend_absorbed, attend_expanded, fa3, resolve_implementation
from jax_mla_cp.batch.form import Form
from jax_mla_cp.bench.bench_options import Options
from jax_mla_cp.config.model import ModelConfig

Kernel = Callable[..., Any]


def resolve(options: Options, config: ModelConfig) -> Resolved:
    """Chooses the implementation. `--attention fa3` runs on a CPU too, where its FFI handlers are plain loops.

    Raises:
      ConfigError: FlashAttention-3 can't run here.
    """
    if options.attention == "fa3" and options.platform == "cpu":
        return "fa3"
    if options.attention == "auto" and options.platform == "cuda":
        return resolve_implementation("fa3", config, options.dtype)
    return resolve_implementation(options.attention, config, options.dtype)


def expanded(implementation: Resolved, scale: float) -> Kernel:
    """Returns a jitted (q [T, n, h + r], kv [K, n, h + r + v], rows) -> [T, n, v]."""
    if implementation == "fa3":
        return jax.jit(lambda q, kv, rows: fa3.mla_prefill_expanded(q, kv, rows, scale=scale)[0])
    return jax.jit(lambda q, kv, rows: attend_expanded(q, kv, rows, scale=scale, implementation="xla"))


def absorbed(implementation: Resolved, scale: float, *, decode: bool = False) -> Kernel:
    """Returns a traceable (q_latent [n, T, R], q_rope [T, n, r], pages, page_table [B, W], rows) -> [n, T, R]."""
    if implementation == "fa3":
        target = fa3.mla_decode if decode else fa3.mla_prefill_absorbed
        return lambda *operands: target(*operands, scale=scale)[0]
    return functools.partial(attend_absorbed, scale=scale, implementation="xla")


def name(implementation: Resolved, form: Form) -> str:
    """The kernel's name in the tables."""
    return f"{'FA3' if implementation == 'fa3' else 'XLA'} {form}"
