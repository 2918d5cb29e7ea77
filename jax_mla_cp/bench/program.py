"""One rank's real program: a model with random weights on a mocked mesh, a step of it compiled once, and run again and again."""

from __future__ import annotations

import dataclasses
import gc
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import PartitionSpec

from jax_mla_cp.attention import Implementation, resolve_implementation
from jax_mla_cp.batch.form import Form
from jax_mla_cp.batch.packing import Packed, packed_specs, unpack
from jax_mla_cp.batch.step_request import StepRequest
from jax_mla_cp.bench.data import normal
from jax_mla_cp.bench.mock import MockBuild, mock_build
from jax_mla_cp.bench.timing import Timing, measure
from jax_mla_cp.bench.weights import random_params, replicated
from jax_mla_cp.cache import PAGES_SPEC
from jax_mla_cp.config.model import ModelConfig
from jax_mla_cp.config.quantization import Quantization
from jax_mla_cp.mesh import TOKENS, TP, MeshShape, make_mesh
from jax_mla_cp.model.build import EP_CHOICES
from jax_mla_cp.model.decoder import Decoder
from jax_mla_cp.model.grouped_matmul import resolve_grouped_matmul
from jax_mla_cp.model.loaded_model import Model, param_specs
from jax_mla_cp.step.forward import forward, put
from jax_mla_cp.step.planner import Planner

PAGE_SIZE = 64


def is_mocked() -> bool:
    """Whether this process runs as one device of a mocked topology: on CPU devices all of them run, and collectives are real."""
    return jax.local_device_count() < jax.device_count()


def make_build(
    config: ModelConfig, mesh: MeshShape, ep_axes: str, dtype: str, attention: Implementation, *, fp8: bool = False
) -> MockBuild:
    """What the model is built with, as `load.plan_build` would; with `fp8`, of a checkpoint as DeepSeek publishes them.

    Raises:
      ConfigError: the attention asked for can't run here.
    """
    resolved = resolve_implementation(attention, config, dtype)
    if fp8:
        config = dataclasses.replace(config, quantization=Quantization("fp8", (128, 128)))
    return mock_build(
        mocked=is_mocked(),
        config=config,
        shape=mesh,
        ep_axes=EP_CHOICES[ep_axes],
        dtype=jnp.dtype(dtype),
        attention=resolved,
        grouped_matmul=resolve_grouped_matmul(),
        fp8=fp8,
    )


def make_model(build: MockBuild) -> Model:
    """A model with random weights."""
    assert build.shape is not None
    mesh = make_mesh(build.shape)
    return Model(random_params(Decoder(build), mesh), build, mesh)


def prompt(model: Model, planner: Planner, new: int, cached: int = 0, requests: int = 1) -> list[StepRequest]:
    """Requests with random tokens, after prefixes whose pages the cache already has; pages in random order.

    The tokens are those whose embeddings the first tp rank keeps: the sum over tp, if it is mocked, has nothing else.
    """
    rng = np.random.default_rng(0)
    vocabulary = min(model.config.vocab_size, model.build.padded_vocab // model.build.axes.size(TP))
    each = -(-(cached + new) // planner.shape.cache.page_size)
    pages = rng.permutation(planner.shape.cache.pages_per_layer)[: requests * each].reshape(requests, each)
    return [StepRequest(rng.integers(0, vocabulary, new), cached, pages[i].tolist()) for i in range(requests)]


@dataclasses.dataclass
class Program:
    """A compiled step with its arguments. Every call runs it on the cache that the call before it left."""

    compiled: jax.stages.Compiled
    model: Model
    pages: jax.Array
    batch: Packed
    tokens: int
    """Of all ranks' buffers."""

    def __call__(self) -> jax.Array:
        out, self.pages = self.compiled(self.model, self.pages, self.batch)
        return out

    def time(self, samples: int) -> Timing:
        """Seconds of a call."""
        return measure(self, samples=samples)

    def set_works(self, planner: Planner, works: Sequence[StepRequest]) -> None:
        """Other works of the same shape."""
        self.batch = planner.batch(works)

    @property
    def memory(self) -> dict[str, float]:
        """GB of one device: what the program is given (weights, cache), what it needs beside, and both."""
        stats: Any = self.compiled.memory_analysis()
        held = stats.argument_size_in_bytes / 1e9
        beside = (stats.temp_size_in_bytes + stats.output_size_in_bytes - stats.alias_size_in_bytes) / 1e9
        return {"args_gb": held, "temp_gb": beside, "memory_gb": held + beside}


Step = Callable[[Model, jax.Array, Packed], tuple[jax.Array, jax.Array]]


def compile_program(
    model: Model, planner: Planner, works: Sequence[StepRequest], *, run: Step = forward, embeds: bool = False
) -> Program:
    """Compiles `run` for a step, with a cache of random latents.

    Args:
      embeds: the step begins with random activations instead of tokens, which skips the embedding.
    """
    host = planner.host_batch([works])
    batch, tokens = put(model, host), len(host.tokens)
    if embeds:
        assert model.mesh is not None
        local = normal(1, (tokens // planner.shape.cp, model.config.hidden_size), model.build.dtype)
        batch = dataclasses.replace(batch, embeds=replicated(local, model.mesh, PartitionSpec(TOKENS)))
    pages = random_cache(model, planner)
    compiled = jax.jit(run, donate_argnums=1).lower(model, pages, batch).compile()
    return Program(compiled, model, pages, batch, tokens)


def random_cache(model: Model, planner: Planner) -> jax.Array:
    """The cache, full of random latents, so that a prefix need not be computed."""
    assert model.mesh is not None
    shape = (planner.shape.cache.total_pages, planner.shape.cache.page_size, model.config.latent_dim)
    return replicated(normal(2, shape, model.build.dtype), model.mesh, PAGES_SPEC)


def only(model_build: MockBuild, name: str, stack: nnx.Module) -> tuple[Model, Step]:
    """A model that runs `stack` in place of its own of that name ("dense" or "moe"), and the step for it.

    The step has neither embedding nor head; its result is the last layer's, after the final norm.
    """
    assert model_build.shape is not None
    mesh = make_mesh(model_build.shape)
    decoder = Decoder(model_build)
    setattr(decoder, name, stack)
    graphdef = nnx.graphdef(decoder)
    params = random_params(decoder, mesh)

    def run(model: Model, pages: jax.Array, batch: Packed) -> tuple[jax.Array, jax.Array]:
        def per_device(params: Any, pages: jax.Array, batch: Packed) -> tuple[jax.Array, jax.Array]:
            return nnx.merge(graphdef, params)(pages, unpack(batch))

        in_specs = (param_specs(model.params), PAGES_SPEC, packed_specs(batch))
        mapped = jax.shard_map(per_device, mesh=mesh, in_specs=in_specs, out_specs=(PartitionSpec(TOKENS), PAGES_SPEC))
        return mapped(model.params, pages, batch)

    return Model(params, model_build, mesh), run


def make_planner(
    model: Model, tokens: int, *, chunk: int | None = None, requests: int = 1, form: Form = "auto"
) -> Planner:
    """For requests of up to `tokens` tokens each, and a cache that holds just these."""
    return Planner.create(
        model,
        cache_tokens=requests * -(-tokens // PAGE_SIZE) * PAGE_SIZE,
        page_size=PAGE_SIZE,
        max_requests=requests,
        max_len=tokens,
        prefill_chunk=chunk,
        form=form,
    )


def with_layers(config: ModelConfig, dense: int, moe: int, positions: int) -> ModelConfig:
    """The model with other numbers of layers, and room for so many positions."""
    return dataclasses.replace(
        config, num_layers=dense + moe, first_k_dense=dense, max_position=max(config.max_position, positions)
    )


def clean_up() -> None:
    """Frees the arrays of programs that are no longer used: what comes next may need the memory."""
    gc.collect()
