"""`model`: one rank's whole prefill, from tokens to logits: time to first token, memory, and modeled communication.

The weights of 61 layers in bfloat16 do not fit one GPU, so only as many MoE layers run as fit. The time per layer, from the
difference to a program with a single MoE layer, stands for each layer that did not run.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp

from jax_mla_cp.bench.bench_options import EpName, FormName, Options, WeightsKind
from jax_mla_cp.bench.links import STATED, communication, query_seconds, work_beside_gather
from jax_mla_cp.bench.mock import MockBuild
from jax_mla_cp.bench.program import (
    Program,
    clean_up,
    compile_program,
    make_build,
    make_model,
    make_planner,
    prompt,
    with_layers,
)
from jax_mla_cp.bench.random_weights import favor_first_rank
from jax_mla_cp.bench.table import Report
from jax_mla_cp.config.model import ModelConfig
from jax_mla_cp.model.loaded_model import Model, weight_bytes
from jax_mla_cp.platform import device_memory

_SWEEP_LAYERS = 4
_LONG_LAYERS = 2
_SPARE_BYTES = 4e9  # not in the compiler's estimate: its own workspace, and making the weights
_HOLD_SECONDS = 3.0


def run(options: Options, config: ModelConfig, report: Report) -> None:
    """Adds the rows."""
    report.notes.append(STATED)
    report.notes.append(
        "all-reduces and the experts' exchange count as exposed. The latent gather counts as overlapped with the query projections "
        "(at the matmul peak) if the compiled schedule overlaps them (`gather beside`)."
    )
    top = max(options.seq, default=0)
    for weights in options.weights_kinds:
        bench = _Bench(options, config, report, weights)
        if top:
            bench.whole(top, options.forms[0], options.ep_axes[0])
        for ep in options.ep_axes:
            if config.num_moe_layers and (options.seq or options.long):
                bench.sweep(ep, options.seq)
        if options.long:
            bench.long(options.ep_axes[0])


class _Bench:
    def __init__(self, options: Options, config: ModelConfig, report: Report, weights: WeightsKind):
        self.options, self.config, self.report, self.weights = options, config, report, weights

    def facts(self, seq: int, form: FormName, ep: EpName) -> dict[str, Any]:
        """Columns that every row has."""
        o = self.options
        mesh = str(o.mesh)
        return {"seq": seq, "form": form, "mesh": mesh, "ep_axes": ep, "dtype": o.dtype, "weights": str(self.weights)}

    def build(self, dense: int, moe: int, positions: int, ep: EpName) -> MockBuild:
        o, part = self.options, with_layers(self.config, dense, moe, positions)
        return make_build(part, o.mesh, ep, o.dtype, o.attention, self.weights)

    def program(self, model: Model, seq: int, form: FormName) -> Program:
        """A program that prefills one whole prompt."""
        planner = make_planner(model, seq, form=form)
        return compile_program(model, planner, prompt(model, planner, seq))

    def whole(self, seq: int, form: FormName, ep: EpName) -> None:
        """Adds rows of the dense layers with as many MoE layers as fit, and with all tokens on this rank's experts."""
        c, o, table = self.config, self.options, f"whole model, {self.config.num_layers} layers"
        dense, facts = c.num_dense_layers, self.facts(seq, form, ep)
        seconds: dict[str, float] = {}
        one: dict[str, float] = {}

        def few() -> dict[str, Any]:
            program = self.program(make_model(self.build(dense, min(1, c.num_moe_layers), seq, ep)), seq, form)
            timing = program.time(o.samples)
            seconds["one"] = timing.seconds
            one.update(program.memory)
            if c.num_moe_layers:
                assert program.model.mesh is not None  # a whole model runs on the mocked one
                skewed = favor_first_rank(program.model.params, program.model.build, program.model.mesh)
                program.model = dataclasses.replace(program.model, params=skewed)
                seconds["skewed"] = program.time(o.samples).seconds
            return {"run": f"{dense} + {min(1, c.num_moe_layers)}"} | timing.row() | program.memory

        def many() -> dict[str, Any]:
            layers = self._fitting(seq, ep, one["temp_gb"] * 1e9)
            if layers < 2:
                raise RuntimeError(f"only {layers} MoE layers fit the memory: the time per layer needs two.")
            layers, program = self._largest(seq, form, ep, layers)
            timing = program.time(o.samples)
            seconds["layer"] = (timing.seconds - seconds["one"]) / (layers - 1)
            seconds["all"] = timing.seconds + (c.num_moe_layers - layers) * seconds["layer"]
            row = {"run": f"{dense} + {layers}"} | timing.row() | program.memory
            return row | self._ttft(seq, ep, seconds["all"], program)

        def skewed() -> dict[str, Any]:
            layer = seconds["layer"] + seconds["skewed"] - seconds["one"]
            total = seconds["all"] + c.num_moe_layers * (layer - seconds["layer"])
            return {"run": f"{dense} + 1", "ms": seconds["skewed"] * 1e3} | self._ttft(seq, ep, total, None)

        first = self.report.row(table, "one MoE layer", few, **facts)
        clean_up()
        row = None
        if first and c.num_moe_layers > 1:
            row = self.report.row(table, "random routing", many, **facts)
            clean_up()
            if row:
                self.report.row(table, "all tokens to this rank's experts", skewed, **facts)
                self.report.notes.append(
                    f"{table}: `run` tells the dense + MoE layers that ran, `ms` their time. A MoE layer takes "
                    f"{seconds['layer'] * 1e3:.4g} ms (with all tokens on this rank's experts "
                    f"{(seconds['layer'] + seconds['skewed'] - seconds['one']) * 1e3:.4g} ms); the totals are of {c.num_moe_layers}. No token "
                    "is dropped. Routing is random and even; in the last row it is this rank's worst case. `all layers GB`: weights "
                    "and cache of all layers, and the step's temporaries."
                )
        if seq == 131072 and c.num_layers == 61 and str(o.mesh) == "tp=8,cp=4":
            self.report.hold(
                f"{c.num_layers} layers, {seq} tokens, {o.mesh}, experts over {ep}: TTFT compute, s",
                row["ttft_compute_s"] if row else None,
                at_most=_HOLD_SECONDS,
            )

    def _largest(self, seq: int, form: FormName, ep: EpName, layers: int) -> tuple[int, Program]:
        """The program with `layers` MoE layers, or with fewer if memory runs out; and the number it has."""

        def attempt(layers: int) -> Program:
            program = self.program(make_model(self.build(self.config.num_dense_layers, layers, seq, ep)), seq, form)
            jax.block_until_ready(program())
            return program

        while True:
            try:
                return layers, attempt(layers)
            except jax.errors.JaxRuntimeError as error:
                if "RESOURCE_EXHAUSTED" not in str(error) or layers <= 2:
                    raise
            clean_up()
            self.report.say(f"{layers} MoE layers do not fit: trying fewer")
            layers = max(2, layers * 4 // 5)

    def sweep(self, ep: EpName, seqs: tuple[int, ...]) -> None:
        """Adds rows over prompt lengths and forms, extrapolated from a few MoE layers."""
        c, o = self.config, self.options
        layers = min(_SWEEP_LAYERS, c.num_moe_layers, o.layers or _SWEEP_LAYERS)
        table = "time to first token"
        held: list[Model] = []

        def one(seq: int, form: FormName) -> dict[str, Any]:
            if not held:
                held.append(make_model(self.build(0, layers, max(seqs), ep)))
            program = self.program(held[0], seq, form)
            timing = program.time(o.samples)
            row = {"run": f"{layers} MoE"} | timing.row() | program.memory
            return row | self._ttft(seq, ep, timing.seconds * c.num_layers / layers, program)

        for seq, form in itertools.product(seqs, o.forms):
            self.report.row(table, "whole prompt", functools.partial(one, seq, form), **self.facts(seq, form, ep))
            clean_up()
        note = f"{table}: {layers} MoE layers run; times are scaled by {c.num_layers} / {layers}, dense layers counted as MoE layers."
        if seqs and note not in self.report.notes:
            self.report.notes.append(note)

    def long(self, ep: EpName) -> None:
        """Prompts in chunks: a few chunks at rising prefixes are timed, the others lie on the lines between them."""
        c, o, form = self.config, self.options, self.options.forms[0]
        layers, chunk, top = min(_LONG_LAYERS, c.num_moe_layers or c.num_layers), o.chunk, max(o.long)
        prefixes = sorted({0, *(max(0, seq - chunk) for seq in o.long)})
        times: dict[int, float] = {}
        made: list[Program] = []
        planners: list[Any] = []

        def measured(prefix: int) -> dict[str, Any]:
            new = min(chunk, top - prefix)
            if not made:
                moe = layers if c.num_moe_layers else 0
                model = make_model(self.build(layers - moe, moe, top, ep))
                planners.append(make_planner(model, top, chunk=min(chunk, top), form=form))
                made.append(compile_program(model, planners[0], prompt(model, planners[0], new, prefix)))
            else:
                made[0].set_requests(planners[0], prompt(made[0].model, planners[0], new, prefix))
            timing = made[0].time(o.samples)
            times[prefix] = timing.seconds
            return {"prefix": prefix, "run": f"{layers} layers"} | timing.row() | made[0].memory

        for prefix in prefixes:
            self.report.row(
                f"chunks of {chunk} tokens",
                "one chunk",
                functools.partial(measured, prefix),
                **self.facts(top, form, ep),
            )

        def total(seq: int) -> dict[str, Any]:
            starts = range(0, seq, chunk)
            seconds = sum(_between(times, start) * min(chunk, seq - start) / chunk for start in starts)
            whole = self._ttft(seq, ep, seconds * c.num_layers / layers, made[0])
            return {"run": f"{layers} layers"} | made[0].memory | whole

        for seq in o.long:
            self.report.row(
                "time to first token", f"chunks of {chunk}", functools.partial(total, seq), **self.facts(seq, form, ep)
            )
        self.report.notes.append(
            f"longer prompts: chunks of {chunk} tokens with {layers} layers, timed after prefixes of "
            f"{', '.join(map(str, prefixes))} tokens, interpolated between these and scaled by {c.num_layers} / {layers}. Positions "
            f"beyond the model's {c.max_position} are for timing only."
        )
        made.clear()
        clean_up()

    def _ttft(self, seq: int, ep: EpName, compute: float, program: Program | None) -> dict[str, Any]:
        """Columns of the whole model's compute, communication, and memory per GPU."""
        c, o = self.config, self.options
        assert self.report.ceilings
        takes = communication(c, o.mesh, ep, seq, jnp.dtype(o.dtype).itemsize)
        beside = None
        hidden = 0.0
        out: dict[str, Any] = {"ttft_compute_s": compute}
        if program is not None:
            beside = work_beside_gather(program.compiled.as_text() or "", program.tokens, c.latent_dim)
            hidden = query_seconds(c, o.mesh, seq, self.report.ceilings.matmul) if beside else 0.0
            weights = weight_bytes(self.build(c.num_dense_layers, c.num_moe_layers, seq, ep))
            held = c.num_layers * seq * c.latent_dim * jnp.dtype(o.dtype).itemsize
            out["total_gb"] = (weights + held) / 1e9 + program.memory["temp_gb"]
            out["gather_beside"] = {None: "blocks", True: "yes", False: "no"}[beside]
        exposed = takes.exposed(hidden)
        return out | {
            "latents_s": takes.latents,
            "sums_s": takes.sums,
            "experts_s": takes.experts,
            "exposed_s": exposed,
            "ttft_s": compute + exposed,
        }

    def _fitting(self, seq: int, ep: EpName, temporaries: float) -> int:
        """The number of MoE layers whose weights and cache fit beside the dense layers and the step's temporaries."""
        c, o = self.config, self.options
        if o.layers:
            return min(o.layers, c.num_moe_layers)

        def held(moe: int) -> float:
            config = with_layers(c, c.num_dense_layers, moe, seq)
            cached = config.num_layers * seq * c.latent_dim * jnp.dtype(o.dtype).itemsize
            return weight_bytes(self.build(c.num_dense_layers, moe, seq, ep)) + cached

        room = device_memory() - temporaries - _SPARE_BYTES
        return max(0, min(c.num_moe_layers, int((room - held(1)) // (held(2) - held(1))) + 1))


def _between(times: dict[int, float], at: int) -> float:
    """Interpolates linearly between the two nearest prefixes; extrapolates beyond the last."""
    known = sorted(times)
    if len(known) == 1:
        return times[known[0]]
    high = next((i for i, prefix in enumerate(known) if prefix >= at and i > 0), len(known) - 1)
    a, b = known[high - 1], known[high]
    return times[a] + (times[b] - times[a]) * (at - a) / (b - a)
