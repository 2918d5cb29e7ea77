"""`layer`: one rank's MLA and MoE layers of a full-size model, whole and in parts at the same shapes.

The whole layers are the model's own code, a few of them under the model's `lax.scan`. Each part is a program of its own.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
from flax import nnx

from jax_mla_cp.bench.bench_options import EpName, FormName, Options, WeightsKind
from jax_mla_cp.bench.mla_parts import mla_parts, time_part
from jax_mla_cp.bench.moe_parts import expert_parts
from jax_mla_cp.bench.profile import time_by_scope
from jax_mla_cp.bench.program import (
    Program,
    clean_up,
    compile_program,
    make_build,
    make_planner,
    model_of_part,
    prompt,
    with_layers,
)
from jax_mla_cp.bench.random_weights import favor_first_rank
from jax_mla_cp.bench.roofline import Cost
from jax_mla_cp.bench.table import Report
from jax_mla_cp.config.model import ModelConfig
from jax_mla_cp.mesh import TP
from jax_mla_cp.model.decoder import Decoder
from jax_mla_cp.model.layer_inputs import LayerInputs
from jax_mla_cp.model.mla import Mla
from jax_mla_cp.model.params import ParamFactory
from jax_mla_cp.model.stack import Layer, LayerStack, Residual, scan_layers

_LAYERS = 4
_HOLD_MLA = 1.15


def run(options: Options, config: ModelConfig, report: Report) -> None:
    """Adds the rows."""
    layers = options.layers or _LAYERS
    report.notes.append(
        f"one device of {options.mesh}; times are per layer, from a program of {layers} layers. MLA: attention, from its normed "
        "input to the sum over tp. MoE: the rest of the layer, that is norm, router, experts, shared experts, sum and residual."
    )
    report.notes.append(
        "roof ms of a whole MLA layer: the sum of its parts' rooflines (matmuls at the run's matmul peak; gather, write and read at "
        "its copy bandwidth), with attention at the measured time of its kernel on the same rows."
    )
    for seq in options.seq:
        held = seq == 131072 and config.hidden_size == 7168 and str(options.mesh) == "tp=8,cp=4"
        for form in options.forms:
            _mla(options, config, report, seq, form, layers, held=held and form == "expanded")
            clean_up()
        if config.n_routed_experts:
            expert_parts(options, config, report, seq, held=held)
            clean_up()
            for ep in options.ep_axes:
                for weights in options.weights_kinds:
                    _moe(options, config, report, seq, ep, weights, layers)
                    clean_up()


class MlaStack(nnx.Module):
    """Replaces a stack of layers with their attention alone, summed over tp."""

    def __init__(self, stack: LayerStack):
        self.build = stack.build
        self.count = stack.count
        self.mla = stack.mla

    def __call__(self, residual: Residual, pages: jax.Array, inputs: LayerInputs) -> tuple[Residual, jax.Array]:
        def run(mla: Mla, x: jax.Array, pages: jax.Array, index: jax.Array) -> tuple[jax.Array, jax.Array]:
            with jax.named_scope("mla"):
                part, pages = mla(x, pages, index, index, inputs)
                return self.build.axes.psum(part, TP), pages

        x, pages = scan_layers(run, Mla(ParamFactory(self.build), self.build), self.mla, residual.x, pages, self.count)
        return Residual.begin(x), pages


class MoeStack(nnx.Module):
    """Replaces a stack of layers with everything but their attention."""

    def __init__(self, stack: LayerStack):
        self.build = stack.build
        self.count = stack.count
        self.mlp_norm = stack.mlp_norm
        self.mlp = stack.mlp

    def __call__(self, residual: Residual, pages: jax.Array, inputs: LayerInputs) -> tuple[Residual, jax.Array]:
        def run(layer: Layer, residual: Residual, pages: jax.Array, index: jax.Array) -> tuple[Residual, jax.Array]:
            return layer.feed_forward(residual, index, inputs.valid), pages

        layer = Layer(ParamFactory(self.build), self.build, experts=True)
        del layer.attn_norm, layer.mla
        return scan_layers(run, layer, self, residual, pages, self.count)


def _program(
    options: Options,
    config: ModelConfig,
    seq: int,
    ep: EpName,
    form: FormName,
    weights: WeightsKind,
    stack: str,
    layers: int,
) -> Program:
    """A program of `layers` layers, of MLA alone (`stack` "dense") or MoE alone ("moe")."""
    dense = stack == "dense"
    part = with_layers(config, layers if dense else 0, 0 if dense else layers, seq)
    build = make_build(part, options.mesh, ep, options.dtype, options.attention, weights)
    decoder = Decoder(build)
    model, step = model_of_part(build, stack, MlaStack(decoder.dense) if dense else MoeStack(decoder.moe))
    planner = make_planner(model, seq, form=form)
    return compile_program(model, planner, prompt(model, planner, seq), run=step, embeds=True)


def _mla(
    options: Options, config: ModelConfig, report: Report, seq: int, form: FormName, layers: int, *, held: bool
) -> None:
    mesh = options.mesh
    facts = {"seq": seq, "form": form, "mesh": str(mesh), "ep_axes": "-", "dtype": options.dtype}
    table = f"MLA layer, {form}, {seq} tokens"
    parts = mla_parts(options, config, seq, form)
    roofs, alone = [], []
    for part in parts:
        row = report.row(table, part.name, functools.partial(time_part, options, report, part), **facts)
        clean_up()
        if row:
            roofs.append(row["ms"] if part.use_measured_time else row["roof_ms"])
            alone.append(row["ms"])

    def whole(weights: WeightsKind) -> dict[str, Any]:
        program = _program(options, config, seq, "tp", form, weights, "dense", layers)
        timing = program.time(options.samples)
        ms = timing.seconds * 1e3 / layers
        _profile(options, report, program, f"{table}, {weights}: time by scope", layers)
        row = timing.row() | {"ms": ms} | program.memory
        if len(roofs) == len(parts):
            row |= {
                "roof_ms": sum(roofs),
                "fraction": sum(roofs) / ms,
                "to_sum": ms / sum(roofs),
                "parts_ms": sum(alone),
            }
        return row

    for weights in options.weights_kinds:
        row = report.row(table, "the whole layer", functools.partial(whole, weights), **facts, weights=str(weights))
        clean_up()
        if held and weights.storage == "bf16":
            seen = row.get("to_sum") if row else None
            report.hold(
                f"MLA layer, {form}, {seq} tokens, {mesh}: time / sum of its rooflines", seen, at_most=_HOLD_MLA
            )


def _moe(
    options: Options,
    config: ModelConfig,
    report: Report,
    seq: int,
    ep: EpName,
    weights: WeightsKind,
    layers: int,
) -> None:
    """Adds rows of the whole MoE layer, with random routing and with this rank's worst case."""
    c, tp = config, options.mesh.tp
    tokens = seq // options.mesh.cp
    facts = {"seq": seq, "mesh": str(options.mesh), "ep_axes": ep, "dtype": options.dtype, "weights": str(weights)}
    table = f"MoE layer, {seq} tokens"
    built: list[Program] = []

    def cost(rows: float) -> Cost:
        expert = 6.0 * c.hidden_size * c.moe_intermediate_size  # FLOPs of a row
        shared = c.n_shared_experts * tokens / tp
        return Cost(flops=expert * (rows + shared) + 2.0 * tokens * c.hidden_size * c.n_routed_experts)

    def random() -> dict[str, Any]:
        program = _program(options, c, seq, ep, options.forms[0], weights, "moe", layers)
        built.append(program)
        timing = program.time(options.samples)
        _profile(options, report, program, f"{table}, experts over {ep}, {weights}: time by scope", layers)
        return _per_layer(report, program, timing.row(), layers, cost(tokens * c.experts_per_token / tp))

    def skewed() -> dict[str, Any]:
        program = built[0]
        assert program.model.mesh is not None
        params = favor_first_rank(program.model.params, program.model.build, program.model.mesh)
        program.model = dataclasses.replace(program.model, params=params)
        timing = program.time(options.samples)
        build = program.model.build
        # As many of a token's experts are on this rank as the rank has and group-limited routing allows.
        here = min(c.experts_per_token, build.padded_experts // build.axes.size(build.ep_axes))
        gathered = seq if "cp" in ep else tokens
        return _per_layer(report, program, timing.row(), layers, cost(gathered * here))

    if report.row(table, "the whole layer, random routing", random, **facts):
        report.row(table, "the whole layer, all tokens to this rank's experts", skewed, **facts)


def _per_layer(report: Report, program: Program, row: dict[str, Any], layers: int, cost: Cost) -> dict[str, Any]:
    seconds = row["ms"] / 1e3 / layers
    return row | {"ms": seconds * 1e3} | report.beside_roof(cost, seconds) | program.memory


def _profile(options: Options, report: Report, program: Program, table: str, layers: int) -> None:
    """With --profile, adds a table of the program's time by scope, per layer."""
    if options.profile is None:
        return
    try:
        scopes = time_by_scope(program, program.compiled, options.profile)
    except Exception as error:
        report.notes.append(f"{table}: no profile ({error}).")
        return
    total = sum(seconds for _, seconds in scopes)
    for scope, seconds in scopes:
        if seconds > total / 1000:
            shown = {"ms": seconds * 1e3 / layers, "share": seconds / total}
            report.row(table, scope, functools.partial(dict, shown))
