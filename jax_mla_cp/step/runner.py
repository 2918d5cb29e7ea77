"""`Runner`: the model, the cache and the compiled programs that the engine steps."""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
from jax.sharding import NamedSharding

from jax_mla_cp import cache
from jax_mla_cp.batch.form import Form
from jax_mla_cp.batch.layout import build
from jax_mla_cp.batch.packing import pack
from jax_mla_cp.batch.shapes import StepShape
from jax_mla_cp.batch.step_request import StepRequest
from jax_mla_cp.cache import PAGES_SPEC
from jax_mla_cp.config.errors import ConfigError
from jax_mla_cp.config.model import ModelConfig
from jax_mla_cp.mesh import declared_specs, mesh_shape
from jax_mla_cp.model.loaded_model import Model, weight_bytes
from jax_mla_cp.platform import default_memory_fraction, device_memory
from jax_mla_cp.step import logit_bias
from jax_mla_cp.step.compile_progress import CompileProgress, CompileTracker
from jax_mla_cp.step.forward import forward_and_sample, put
from jax_mla_cp.step.planner import Planner
from jax_mla_cp.step.results import RunnerOutput, read_results

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
        self._compile_tracker = CompileTracker(len(self._shapes))
        self._pages = planner.new_cache()
        self._bias_builder = logit_bias.LogitBiasBuilder(planner.model, planner.shape)

    @property
    def config(self) -> ModelConfig:
        return self.planner.model.config

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
    def page_size(self) -> int:
        return self.planner.shape.cache.page_size

    @property
    def pages_per_group(self) -> int:
        return self.planner.shape.cache.pages_per_layer

    def reset(self) -> None:
        """A new, empty cache: after a step failed, the donated one may be gone."""
        self._pages = self.planner.new_cache()

    def check(self, request: StepRequest) -> None:
        """Checks one request alone.

        Raises:
          ValueError: it doesn't fit, as in `step`.
        """
        self.planner.lay_out([[request], *[[]] * (self.dp - 1)])

    def step(self, groups: Sequence[Sequence[StepRequest]]) -> RunnerOutput:
        """Runs one step and waits for its results.

        Args:
          groups: per dp group, at most `max_running` requests; their new tokens, those of decoding requests aside, at most
            `prefill_chunk`.

        Raises:
          ValueError: a request that doesn't fit; nothing has run then.
        """
        planner, model = self.planner, self.planner.model
        layout = planner.lay_out(groups)
        batch = put(model, build(layout, planner.shape))
        program = self._program(layout.step)
        output, self._pages = program(model, self._pages, batch, self._bias_builder(groups))
        return read_results(jax.device_get(output), layout, planner.shape)

    @property
    def compiling(self) -> CompileProgress | None:
        """The compilation in progress; None: nothing is being compiled. May be read from any thread."""
        return self._compile_tracker.progress

    @property
    def grid(self) -> str:
        """The programs, for people: tokens per step of a dp group."""
        cp = self.planner.shape.cp
        sizes = " ".join(str(bucket * cp) for bucket in self.planner.buckets)
        return f"{len(self._shapes)} programs, tokens per step: {sizes}"

    def warmup(self, progress: Callable[[Iterable[Any], int], Iterable[Any]] = lambda done, total: done) -> None:
        """Compiles all programs, several at a time. `progress` wraps what yields once for each, as rich.progress.track does."""
        self._bias_builder.warmup()
        with ThreadPoolExecutor(_COMPILERS) as pool:
            for _ in progress(pool.map(self._program, self._shapes), len(self._shapes)):
                pass

    @property
    def _shapes(self) -> tuple[StepShape, ...]:
        return self.planner.steps + self.planner.prompt_logprobs_steps

    def _program(self, shape: StepShape) -> jax.stages.Compiled:
        if shape not in self._programs:
            with self._compile_tracker.compiling(shape.tokens * self.cp) as progress:
                log.info("%s", progress)
                self._programs[shape] = compile_step(self.planner, shape)
            log.debug("compiled %s in %.1f s", shape, time.monotonic() - progress.since)
        return self._programs[shape]


def compile_step(planner: Planner, shape: StepShape) -> jax.stages.Compiled:
    """The step of one shape, its cache donated: called with (model, pages, packed batch, adjustments)."""
    model = planner.model
    packed = pack(planner.sample_batch(shape), mesh_shape(model.mesh))
    batch = jax.tree.map(lambda x, spec: _struct(model, x, spec), packed, declared_specs(packed))
    pages = _struct(model, jax.eval_shape(planner.new_cache), PAGES_SPEC)
    program = jax.jit(functools.partial(forward_and_sample, prompt_logprobs=shape.prompt_logprobs), donate_argnums=1)
    return program.lower(model, pages, batch, logit_bias.shapes(model, planner.shape)).compile()


def _struct(model: Model, x: Any, spec: Any) -> jax.ShapeDtypeStruct:
    sharding = None if model.mesh is None else NamedSharding(model.mesh, spec)
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)


def create_runner(
    model: Model,
    *,
    page_size: int,
    kv_pages: int | None,
    memory_fraction: float | None,
    prefill_chunk: int,
    max_model_len: int | None,
    max_running: int,
    form: Form = "auto",
    draft_tokens: int = 0,
) -> Runner:
    """Sizes the cache and makes the runner.

    Args:
      kv_pages: pages per dp group; None: what `memory_fraction` of a device leaves after the weights and the largest
        step's temporaries, but no more than `max_running` requests of the model's full length could fill.
      memory_fraction: None: `platform.default_memory_fraction`.
      max_model_len: None: the smaller of the model's length and what the pages hold.
      max_running: requests at a time, per dp group.
      draft_tokens: as in `Planner.create`.

    Raises:
      ConfigError: the pages asked for don't fit, or not even one does, or `max_model_len` is more than the pages hold.
    """
    if memory_fraction is None:
        memory_fraction = default_memory_fraction()
    longest = model.config.max_position if max_model_len is None else max_model_len
    if longest > model.config.max_position:
        raise ConfigError(
            "max_model_len", f"must be at most the model's {model.config.max_position} positions, got {longest}."
        )
    useful = max_running * -(-longest // page_size)
    sizes: dict[str, Any] = {
        "page_size": page_size,
        "max_requests": max_running,
        "prefill_chunk": prefill_chunk,
        "form": form,
        "draft_tokens": draft_tokens,
    }
    # Told by compiling the largest steps for a cache of the smallest useful size.
    probe = Planner.create(model, cache_tokens=longest, max_len=longest, **sizes)
    room = _pages_that_fit(probe, memory_fraction)
    if kv_pages is None:
        kv_pages = min(useful, room)
        if kv_pages < 1:
            raise ConfigError(
                "memory_fraction",
                f"{memory_fraction} leaves no room for a single page of the cache on a device with "
                f"{device_memory() / 2**30:.1f} GiB. Use a larger `mesh`, or a smaller `prefill_chunk` or `max_model_len`.",
            )
    elif kv_pages > room:
        raise ConfigError(
            "kv_pages",
            f"must be at most {max(room, 0)}, got {kv_pages}: that many pages of {page_size} tokens fit into "
            f"{memory_fraction:.0%} of a device's {device_memory() / 2**30:.1f} GiB beside weights and temporaries.",
        )
    held = kv_pages * page_size
    if max_model_len is not None and max_model_len > held:
        raise ConfigError(
            "max_model_len",
            f"must be at most {held}, got {max_model_len}: {kv_pages} pages of {page_size} hold {held} tokens. "
            f"Use max_model_len={held}, or more `kv_pages`.",
        )
    longest = min(longest, held)
    planner = Planner.create(model, cache_tokens=held, max_len=longest, **sizes)
    return Runner(planner, prefill_chunk=prefill_chunk, max_running=max_running, max_model_len=longest)


def _temporaries(program: jax.stages.Compiled) -> int:
    """Bytes that a step takes on a device beside its arguments."""
    stats: Any = program.memory_analysis()
    return stats.temp_size_in_bytes + stats.output_size_in_bytes - stats.alias_size_in_bytes


def _pages_that_fit(probe: Planner, fraction: float) -> int:
    """Pages that fit a device beside what the planner's largest steps need."""
    model = probe.model
    # The last has the most absorbed tokens, but only few of them take decode's kernel and its scratch (attention/fa3.py).
    largest = [probe.prompt_logprobs_steps[-1], *(probe.steps[-2:-1] if model.build.attention == "fa3" else ())]
    log.info(
        "sizing the KV cache: compiling the largest %d of the programs to measure their memory (about 10 s each; the "
        "compile cache makes later starts faster)",
        len(largest),
    )
    needs = max(map(_temporaries, (compile_step(probe, shape) for shape in largest)))
    free = device_memory() * fraction - needs - logit_bias.device_bytes(model, probe.shape)
    if jax.local_devices()[0].platform != "cpu":  # what is free on a CPU no longer holds the weights
        free -= weight_bytes(model.build)
    layout = probe.shape.cache
    return int(free // cache.page_bytes(layout.layers, layout.page_size, model.config.latent_dim, model.build.dtype))
