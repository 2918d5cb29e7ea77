"""`Runner`: the model, the cache and the compiled programs that the engine steps."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import logging
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding
from jaxtyping import UInt32
from numpy.typing import NDArray

from jax_mla_cp.batch.layout import StepLayout, build_batch
from jax_mla_cp.batch.packing import pack
from jax_mla_cp.batch.page_table import TableMirror
from jax_mla_cp.batch.shapes import BatchShape, StepShape
from jax_mla_cp.batch.step_request import StepRequest
from jax_mla_cp.cache import PAGES_SPEC
from jax_mla_cp.mesh import declared_specs, mesh_shape, on_devices
from jax_mla_cp.model.loaded_model import Model
from jax_mla_cp.step import logit_bias
from jax_mla_cp.step.compile_progress import CompileProgress, CompileTracker
from jax_mla_cp.step.errors import PageTableLost
from jax_mla_cp.step.forward import SLOTS_SPEC, forward_from_slots, place
from jax_mla_cp.step.inputs import StepInputs
from jax_mla_cp.step.planner import Planner
from jax_mla_cp.step.results import RunnerOutput, read_results
from jax_mla_cp.step.sampling import SamplerOutput

log = logging.getLogger(__name__)

_COMPILERS = 4
"""Programs that are compiled at a time: XLA's own threads leave most of a machine's cores idle."""


class Runner:
    """Model weights, the paged cache, and one compiled step per shape.

    Not thread-safe: one thread steps it.
    """

    def __init__(self, planner: Planner, *, prefill_chunk: int, max_running: int, max_model_len: int):
        self.planner = planner
        self.prefill_chunk = prefill_chunk
        self.max_running = max_running
        self.max_model_len = max_model_len
        self._programs: dict[StepShape, jax.stages.Compiled] = {}
        self._fingerprints: dict[StepShape, str] = {}
        self._compile_tracker = CompileTracker(len(self._shapes))
        self.reset()
        self._bias_builder = logit_bias.LogitBiasBuilder(planner.model, planner.shape)

    @property
    def dp(self) -> int:
        return self.planner.shape.dp

    @property
    def cp(self) -> int:
        return self.planner.shape.cp

    @property
    def draft_tokens(self) -> int:
        """Most drafts of a request in a step; 0: no speculation."""
        return self.planner.shape.draft_tokens

    @property
    def runs_ahead(self) -> bool:
        """True if a step may be dispatched before the one before it has been read. Drafts are verified on the host."""
        return not self.draft_tokens

    @property
    def page_size(self) -> int:
        return self.planner.shape.cache.page_size

    @property
    def pages_per_group(self) -> int:
        return self.planner.shape.cache.pages_per_layer

    def reset(self) -> None:
        """A new, empty cache: after a step failed, the donated one may be gone, and so may what the step gave. The whole page table
        is sent anew."""
        shape, mesh = self.planner.shape, self.planner.model.mesh
        self._pages = self.planner.new_cache()
        self._last_tokens = on_devices(_no_tokens(shape), SLOTS_SPEC, mesh)
        self._mirror = TableMirror(shape)
        self._page_table = on_devices(self._mirror.whole, SLOTS_SPEC, mesh)

    def check(self, request: StepRequest) -> None:
        """Checks one request alone.

        Raises:
          ValueError: it doesn't fit, as in `step`.
        """
        self.planner.lay_out([[request], *[[]] * (self.dp - 1)])

    def step(self, groups: Sequence[Sequence[StepRequest]]) -> RunnerOutput:
        """Runs one step and waits for its results. Arguments and errors as in `dispatch`."""
        return self.dispatch(groups).result()

    def dispatch(self, groups: Sequence[Sequence[StepRequest]]) -> DispatchedStep:
        """Starts one step. The devices run steps in the order in which they are dispatched.

        Args:
          groups: per dp group, at most `max_running` requests; their new tokens, those of decoding requests aside, at most
            `prefill_chunk`.

        Raises:
          ValueError: a request that doesn't fit; nothing runs then.
        """
        layout, inputs = self.prepare(groups)
        return DispatchedStep(self.launch(inputs), layout, inputs.table_checksum, self.planner.shape)

    def prepare(self, groups: Sequence[Sequence[StepRequest]]) -> tuple[StepLayout, StepInputs]:
        """Lays out a step on the host. Launch it before another one is prepared: that one's changes of the page table are to what this
        one leaves.

        Raises:
          ValueError: as `step`.
        """
        layout, shape = self.planner.lay_out(groups), self.planner.shape
        update = self._mirror.update(layout.columns, layout.step)
        packed = pack(build_batch(layout, shape, update), mesh_shape(self.planner.model.mesh))
        bias = self._bias_builder.collect(groups)
        self._mirror.apply(update)  # last: a step that is refused changes nothing
        return layout, StepInputs(layout.step, packed, bias, update.whole, update.checksum)

    def execute(self, inputs: StepInputs) -> SamplerOutput:
        """`launch`, and waits for the output, as NumPy arrays."""
        on_host: SamplerOutput = jax.device_get(self.launch(inputs))
        return on_host

    def launch(self, inputs: StepInputs) -> SamplerOutput:
        """Starts a step on the devices and returns its output to be. On a mesh of several processes, all of them must launch the
        same inputs in the same order."""
        model = self.planner.model
        program = self._program(inputs.shape)
        batch, bias = place(model, inputs.batch), self._bias_builder.place(inputs.bias)
        if inputs.page_table is not None:
            self._page_table = on_devices(inputs.page_table, SLOTS_SPEC, model.mesh)
        output, self._pages, self._last_tokens, self._page_table = program(
            model, self._pages, batch, bias, self._last_tokens, self._page_table
        )
        return output

    def is_compiled(self, shape: StepShape) -> bool:
        return shape in self._programs

    def fingerprint(self, shape: StepShape) -> str:
        """Hash of a program before XLA compiles it, equal in processes that run the same. Compiles it if it is new. The mesh must
        be of several processes."""
        self._program(shape)
        return self._fingerprints[shape]

    @property
    def compiling(self) -> CompileProgress | None:
        """The compilation in progress; None: nothing is being compiled. May be read from any thread."""
        return self._compile_tracker.progress

    @property
    def grid(self) -> str:
        """Summary of the programs for the log: tokens per step of a dp group."""
        cp = self.planner.shape.cp
        sizes = " ".join(str(bucket * cp) for bucket in self.planner.buckets)
        return f"{len(self._shapes)} programs, tokens per step: {sizes}"

    def warmup(self, progress: Callable[[Iterable[Any], int], Iterable[Any]] = lambda done, total: done) -> None:
        """Compiles all programs, several at a time. `progress` wraps an iterable that yields once per program, as rich.progress.track does."""
        self._bias_builder.warmup()
        with ThreadPoolExecutor(_COMPILERS) as pool:
            for _ in progress(pool.map(self._program, self._shapes), len(self._shapes)):
                pass

    @property
    def _is_multi_process(self) -> bool:
        mesh = self.planner.model.mesh
        return mesh is not None and mesh.is_multi_process

    @property
    def _shapes(self) -> tuple[StepShape, ...]:
        return self.planner.step_shapes + self.planner.prompt_logprobs_shapes

    def _program(self, shape: StepShape) -> jax.stages.Compiled:
        if shape not in self._programs:
            with self._compile_tracker.compiling(shape.tokens * self.cp) as progress:
                log.info("%s", progress)
                lowered = lower_step(self.planner, shape)
                if self._is_multi_process:
                    self._fingerprints[shape] = hashlib.sha256(lowered.as_text().encode()).hexdigest()[:16]
                self._programs[shape] = lowered.compile()
            log.debug("compiled %s in %.1f s", shape, time.monotonic() - progress.since)
        return self._programs[shape]


@dataclasses.dataclass(frozen=True)
class DispatchedStep:
    """A step that the devices run, or have run."""

    output: SamplerOutput
    """On the devices."""
    layout: StepLayout
    table_checksum: UInt32[np.ndarray, " dp"]
    """`StepInputs.table_checksum`."""
    shape: BatchShape

    def result(self) -> RunnerOutput:
        """Waits for the step and returns its results. Raises what it failed with, also if it ran with another page table."""
        output: SamplerOutput = jax.device_get(self.output)
        check_table(output, self.table_checksum)
        return read_results(output, self.layout, self.shape)


def check_table(output: SamplerOutput, expected: UInt32[np.ndarray, " dp"]) -> None:
    """Checks that a step has used the page table that it was meant to.

    Raises:
      PageTableLost: it has used another one.
    """
    wrong = np.flatnonzero(output.table_checksum != expected)
    if len(wrong):
        g = wrong[0]
        raise PageTableLost(
            f"the page table of dp group {g} is not the host's: its checksum is {output.table_checksum[g]:08x}, expected "
            f"{expected[g]:08x}."
        )


def compile_step(planner: Planner, shape: StepShape) -> jax.stages.Compiled:
    """Compiles the step of one shape, its cache and page table donated: called with (model, pages, batch, bias, last_tokens, page_table)."""
    return lower_step(planner, shape).compile()


def lower_step(planner: Planner, shape: StepShape) -> jax.stages.Lowered:
    """`compile_step` before XLA compiles."""
    model = planner.model
    packed = pack(planner.dummy_batch(shape, keeps_table=True), mesh_shape(model.mesh))
    batch = jax.tree.map(lambda x, spec: _struct(model, x, spec), packed, declared_specs(packed))
    pages = _struct(model, jax.eval_shape(planner.new_cache), PAGES_SPEC)
    last_tokens, page_table = (
        _struct(model, x, SLOTS_SPEC) for x in (_no_tokens(planner.shape), TableMirror(planner.shape).whole)
    )
    run = functools.partial(forward_from_slots, prompt_logprobs=shape.prompt_logprobs)
    program = jax.jit(run, donate_argnums=(1, 5))
    return program.lower(model, pages, batch, logit_bias.shapes(model, planner.shape), last_tokens, page_table)


def _no_tokens(shape: BatchShape) -> NDArray[np.int32]:
    return np.zeros(shape.dp * shape.max_requests, np.int32)


def _struct(model: Model, x: Any, spec: Any) -> jax.ShapeDtypeStruct:
    sharding = None if model.mesh is None else NamedSharding(model.mesh, spec)
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
