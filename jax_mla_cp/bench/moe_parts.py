"""The parts of a rank's MoE layer, experts over tp: products, dispatch and combine, router."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_mla_cp.bench.bench_options import Options
from jax_mla_cp.bench.data import normal
from jax_mla_cp.bench.expert_products import FEW_TOKENS, both_products, choices, product_row
from jax_mla_cp.bench.fp8_products import fp8_rows
from jax_mla_cp.bench.mla_parts import Part, product, time_part
from jax_mla_cp.bench.program import clean_up
from jax_mla_cp.bench.roofline import Cost
from jax_mla_cp.bench.table import Report
from jax_mla_cp.config.model import ModelConfig
from jax_mla_cp.model.experts import apply_experts
from jax_mla_cp.model.grouped_matmul import group_alignment, grouped_matmul, has_kernels, resolve_grouped_matmul
from jax_mla_cp.model.router import route

_HOLD_GROUPED = 0.9
_HOLD_DISPATCH = 0.25


def expert_parts(options: Options, config: ModelConfig, report: Report, seq: int, *, held: bool) -> None:
    """Adds rows of the MoE layer's parts with experts over tp: this rank's (token, expert) pairs, over few and over all its experts."""
    c, tp = config, options.mesh.tp
    tokens = seq // options.mesh.cp
    rows = max(128, tokens * c.experts_per_token // tp)
    local = max(1, c.n_routed_experts // tp)
    few = min(8, local)
    facts = {"seq": seq, "mesh": str(options.mesh), "ep_axes": "tp", "dtype": options.dtype}
    table = f"MoE layer's parts, {seq} tokens"

    def timed(name: str, cost: Cost, make: Callable[[], Callable[[], Any]]) -> float | None:
        row = report.row(table, name, lambda: time_part(options, report, Part(name, cost, make)), **facts)
        clean_up()
        return row["ms"] if row else None

    for what, k, n in (
        ("gate and up", c.hidden_size, 2 * c.moe_intermediate_size),
        ("down", c.moe_intermediate_size, c.hidden_size),
    ):
        cost = Cost(flops=2.0 * rows * k * n, moved=2.0 * (rows * (k + n) + few * k * n))
        dense = timed(f"dense product, {what}: {rows} x {k} x {n}", cost, product(options, "", rows, k, n).make)
        sizes = {
            f"{few} experts, even": np.full(few, rows // few, np.int32),
            f"{local} experts, randomly routed": _uneven(rows, local),
        }
        grouped_ms = {}
        for name, counts in sizes.items():
            cost = Cost(flops=2.0 * rows * k * n, moved=2.0 * (rows * (k + n) + len(counts) * k * n))
            make = functools.partial(_grouped, options, rows, k, n, counts)
            grouped_ms[name] = timed(f"grouped, {name}", cost, make)
        if any(kind.storage == "fp8" and kind.compute == "w8a8" for kind in options.weights_kinds):
            fp8_rows(options, report, table, facts, what, k, n, sizes, grouped_ms, held=held)
        if held:
            grouped = grouped_ms[f"{few} experts, even"]
            seen = dense / grouped if dense and grouped else None
            report.hold(
                f"grouped product, {what}, {rows} rows, {few} experts: of a dense one", seen, at_least=_HOLD_GROUPED
            )

    if seq <= FEW_TOKENS:
        for name in options.weights:
            product_row(options, config, report, seq, name)
    expert = 6.0 * c.hidden_size * c.moe_intermediate_size
    weights = 6.0 * local * c.hidden_size * c.moe_intermediate_size
    cost = Cost(flops=expert * rows, moved=4.0 * rows * c.hidden_size + weights)
    products = timed("both grouped products and silu, the same rows", cost, lambda: _both(options, c, tokens, local))
    whole = timed("dispatch, both products, combine", cost, lambda: _apply(options, c, tokens, local))
    moving = None if products is None or whole is None else whole - products

    def difference() -> dict[str, Any]:
        if moving is None or products is None:
            raise RuntimeError("one of the two rows it is the difference of has failed")
        least = Cost(moved=2.0 * c.hidden_size * (2 * rows + rows + tokens))
        return {"ms": moving, "of_products": moving / products} | report.beside_roof(least, moving / 1e3)

    row = report.row(table, "dispatch and combine: the difference", difference, **facts)
    if held:
        report.hold(
            "dispatch and combine: of the experts' products",
            row["of_products"] if row else None,
            at_most=_HOLD_DISPATCH,
        )
    timed("router", Cost(flops=2.0 * tokens * c.hidden_size * c.n_routed_experts), lambda: _route(options, c, tokens))


def _uneven(rows: int, experts: int) -> np.ndarray:
    return np.random.default_rng(0).multinomial(rows, np.full(experts, 1 / experts)).astype(np.int32)


def _grouped(options: Options, rows: int, k: int, n: int, sizes: np.ndarray) -> Callable[[], Any]:
    a, b = normal(0, (rows, k), options.dtype), normal(1, (len(sizes), n, k), options.dtype)
    program = jax.jit(functools.partial(grouped_matmul, implementation=resolve_grouped_matmul()))
    placed = jnp.asarray(sizes)
    return lambda: program(a, b, placed)


def _expert_weights(options: Options, config: ModelConfig, experts: int) -> tuple[jax.Array, jax.Array]:
    c = config
    gate_up = normal(1, (experts, 2 * c.moe_intermediate_size, c.hidden_size), options.dtype, c.hidden_size**-0.5)
    return gate_up, normal(
        2, (experts, c.hidden_size, c.moe_intermediate_size), options.dtype, c.moe_intermediate_size**-0.5
    )


def _both(options: Options, config: ModelConfig, tokens: int, experts: int) -> Callable[[], Any]:
    """The experts' two matmuls, on the rows that `_apply` gives each expert, rounded up to whole tiles."""
    counts = np.bincount(choices(config, tokens).ravel(), minlength=config.n_routed_experts)[:experts]
    weights = _expert_weights(options, config, experts)
    align = group_alignment(weights[0], int(counts.sum()), experts, resolve_grouped_matmul())
    sizes = -(-counts // align) * align
    x = normal(0, (int(sizes.sum()), config.hidden_size), options.dtype)

    program, placed = jax.jit(both_products), jnp.asarray(sizes.astype(np.int32))
    return lambda: program(x, *weights, placed)


def _apply(options: Options, config: ModelConfig, tokens: int, experts: int) -> Callable[[], Any]:
    """The model's own function, on this rank's share of the experts."""
    x = normal(0, (tokens, config.hidden_size), options.dtype)
    chosen = jnp.asarray(choices(config, tokens))
    weight = jnp.full(chosen.shape, 1 / config.experts_per_token, jnp.float32)
    weights = _expert_weights(options, config, experts)
    apply = functools.partial(
        apply_experts,
        num_experts=experts,
        first=0,
        ep_size=options.mesh.tp,
        implementation=resolve_grouped_matmul(),
    )
    program = jax.jit(apply)
    return lambda: program(x, chosen, weight, *weights)


def _route(options: Options, config: ModelConfig, tokens: int) -> Callable[[], Any]:
    x = normal(0, (tokens, config.hidden_size), options.dtype)
    router = normal(1, (config.hidden_size, config.n_routed_experts), jnp.float32, config.hidden_size**-0.5)
    bias = normal(2, (config.n_routed_experts,), jnp.float32, 0.1)
    program = jax.jit(functools.partial(route, config=config, kernels=has_kernels(resolve_grouped_matmul())))
    return lambda: program(x, router, bias)
