"""`attention`: an unsharded prompt and each cp rank's rows of it, in both forms, compared with cuDNN and tokamax."""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_mla_cp.attention import Resolved
from jax_mla_cp.batch.rows import Rows
from jax_mla_cp.bench import kernels
from jax_mla_cp.bench.bench_options import FormName, Options
from jax_mla_cp.bench.data import normal
from jax_mla_cp.bench.program import PAGE_SIZE, clean_up
from jax_mla_cp.bench.roofline import Cost, attention_bytes, attention_flops, rank_rows
from jax_mla_cp.bench.table import Report
from jax_mla_cp.bench.timing import Timing, measure, measure_in_turn
from jax_mla_cp.config.model import ModelConfig

_HELD_SEQ, _HELD_HEADS = 131072, 16
_HOLD: dict[str, dict[str, float]] = {
    "expanded": {"peak": 0.86, "balance": 0.96},
    "absorbed": {"peak": 0.78, "balance": 0.985},
}
_HOLD_CUDNN = 1.4


def run(options: Options, config: ModelConfig, report: Report) -> None:
    """Adds the rows."""
    implementation = kernels.resolve(options, config)
    if implementation == "fa3" and options.dtype != "bfloat16":
        report.notes.append("FlashAttention-3 computes in bfloat16, whatever --dtype says.")
    report.notes.append(
        "balance: time of the unsharded call / cp / time of the slowest rank. FLOPs count unmasked query-key pairs only. cuDNN and "
        "tokamax run the whole prompt with values padded to the keys' width, 192; `x faster` compares the unsharded expanded call."
    )
    if importlib.util.find_spec("tokamax") is None:
        report.notes.append("tokamax is not installed (pip install tokamax): no rows of it.")
    for heads in options.heads:
        for seq in options.seq:
            bench = _Bench(options, config, report, implementation, seq, heads)
            unsharded = {form: bench.form(form) for form in options.forms}
            if "expanded" in options.forms and options.platform == "cuda":
                bench.others(unsharded["expanded"])


class _Bench:
    """Adds the rows of one prompt length and number of heads."""

    def __init__(
        self, options: Options, config: ModelConfig, report: Report, implementation: Resolved, seq: int, heads: int
    ):
        self.options, self.config, self.report, self.implementation = options, config, report, implementation
        self.seq, self.heads = seq, heads
        self.held = (seq, heads, config.latent_dim) == (_HELD_SEQ, _HELD_HEADS, 576)
        self.facts = {"seq": seq, "heads": heads, "dtype": options.dtype}

    def form(self, form: FormName) -> float | None:
        """Adds all rows of a form, timed in turn. Returns the unsharded call's seconds, or None if they failed."""
        call = _expanded_call if form == "expanded" else _absorbed_call
        name = kernels.name(self.implementation, form)
        places = [(1, 0)] + [(cp, rank) for cp in self.options.cp if self.seq >= 2 * cp for rank in range(cp)]
        work = [rank_rows(self.seq, cp, rank) for cp, rank in places]
        self.report.say(f"attention: {name}, {self.seq} tokens, {self.heads} heads, {len(places)} calls in turn")
        try:
            run = call(self.implementation, self.options, self.config, self.seq, self.heads)
            timings = measure_in_turn([run(rows) for rows, _ in work], samples=self.options.samples)
        except Exception as error:
            self._failed(name, error)
            return None
        for (cp, rank), (rows, pairs), timing in zip(places, work, timings, strict=True):
            self.report.row(
                "attention",
                name,
                functools.partial(self._row, form, rows, pairs, timing),
                **self.facts,
                cp=cp,
                rank="" if cp == 1 else rank,
            )
        full = timings[0].seconds
        if self.held and form in _HOLD:
            fraction = self.report.rows[-len(places)].get("fraction")
            self.report.hold(
                f"{form}, {self.seq} tokens, {self.heads} heads: of matmul peak", fraction, at_least=_HOLD[form]["peak"]
            )
        for cp in {cp: None for cp, _ in places[1:]}:
            ranks = [timing.seconds for place, timing in zip(places, timings, strict=True) if place[0] == cp]
            self._balance(form, cp, full / cp / max(ranks))
        del run
        clean_up()
        return full

    def _failed(self, name: str, error: Exception) -> None:
        def again() -> dict[str, Any]:
            raise error

        self.report.row("attention", name, again, **self.facts)

    def _row(self, form: FormName, rows: Rows, pairs: int, timing: Timing) -> dict[str, Any]:
        cost = Cost(
            flops=attention_flops(form, self.config, pairs, self.heads),
            moved=attention_bytes(form, self.config, int(rows.cu_q[-1]), int(rows.kv_len.max()), self.heads),
        )
        row = timing.row() | self.report.beside_roof(cost, timing.seconds)
        del row["gbs"]  # memory does not bound it
        return row

    def _balance(self, form: FormName, cp: int, balance: float) -> None:
        rows = [row for row in self.report.rows if row["cp"] == cp and row["what"].endswith(form)][-cp:]
        max(rows, key=lambda row: row["ms"])["balance"] = balance
        if self.held and form in _HOLD:
            self.report.hold(f"{form}, cp={cp}: balance", balance, at_least=_HOLD[form]["balance"])

    def others(self, ours: float | None) -> None:
        """Adds rows of cuDNN's and tokamax's attention on the same prompt."""
        contenders: dict[str, Callable[..., Any]] = {
            "cuDNN (jax.nn)": lambda q, k, v, scale: jax.nn.dot_product_attention(
                q, k, v, scale=scale, is_causal=True, implementation="cudnn"
            )
        }
        if importlib.util.find_spec("tokamax"):
            contenders["tokamax"] = _tokamax
        for name, attend in contenders.items():
            row = self.report.row(
                "attention", name, functools.partial(self._other, attend, ours), **self.facts, cp=1, rank=""
            )
            if self.held and name.startswith("cuDNN"):
                self.report.hold(
                    "expanded, unsharded: times faster than cuDNN", row.get("vs") if row else None, at_least=_HOLD_CUDNN
                )
        clean_up()

    def _other(self, attend: Callable[..., Any], ours: float | None) -> dict[str, Any]:
        c = self.config
        dim = c.qk_nope_head_dim + c.qk_rope_head_dim
        q, k = (normal(i, (1, self.seq, self.heads, dim), self.options.dtype) for i in range(2))
        v = normal(2, (1, self.seq, self.heads, c.v_head_dim), self.options.dtype)
        v = jnp.pad(v, ((0, 0), (0, 0), (0, 0), (0, dim - c.v_head_dim)))
        program = jax.jit(lambda q, k, v: attend(q, k, v, c.softmax_scale))
        timing = measure(lambda: program(q, k, v), samples=self.options.samples)
        _, pairs = rank_rows(self.seq, 1, 0)
        cost = Cost(flops=attention_flops("expanded", c, pairs, self.heads))
        row = timing.row() | self.report.beside_roof(cost, timing.seconds)
        return row if ours is None else row | {"vs": timing.seconds / ours}


def _tokamax(q: jax.Array, k: jax.Array, v: jax.Array, scale: float) -> Any:
    return importlib.import_module("tokamax").dot_product_attention(
        q, k, v, scale=scale, is_causal=True, implementation=("mosaic", "triton")
    )  # its last resort, XLA, makes an S x S array


def _expanded_call(
    implementation: Resolved, options: Options, config: ModelConfig, seq: int, heads: int
) -> Callable[[Rows], Callable[[], Any]]:
    """Makes the operands once. Returns a function from rows to the call that runs them."""
    dim = config.qk_nope_head_dim + config.qk_rope_head_dim
    q = normal(0, (seq, heads, dim), options.dtype)
    kv = normal(1, (seq, heads, dim + config.v_head_dim), options.dtype)
    kernel = kernels.expanded(implementation, config.softmax_scale)

    def call(rows: Rows) -> Callable[[], Any]:
        part, placed = q[: int(rows.cu_q[-1])], jax.device_put(rows)
        return lambda: kernel(part, kv, placed)

    return call


def _absorbed_call(
    implementation: Resolved, options: Options, config: ModelConfig, seq: int, heads: int
) -> Callable[[Rows], Callable[[], Any]]:
    """Like `_expanded_call`, over pages in random order. All rows share their pages, because they are of one prompt."""
    c = config
    q_latent = normal(0, (heads, seq, c.kv_lora_rank), options.dtype)
    q_rope = normal(1, (seq, heads, c.qk_rope_head_dim), options.dtype)
    width = -(-seq // PAGE_SIZE)
    pages = normal(2, (width, PAGE_SIZE, c.latent_dim), options.dtype)
    order = np.random.default_rng(0).permutation(width).astype(np.int32)
    kernel = jax.jit(kernels.absorbed(implementation, c.softmax_scale))

    def call(rows: Rows) -> Callable[[], Any]:
        tokens = int(rows.cu_q[-1])
        table = jnp.asarray(np.tile(order, (len(rows.kv_len), 1)))
        placed = jax.device_put(rows)
        latent, rope = q_latent[:, :tokens], q_rope[:tokens]
        return lambda: kernel(latent, rope, pages, table, placed)

    return call
