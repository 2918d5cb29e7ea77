"""One rank's real program: a model with random weights on a mocked mesh, and a compiled step of it to run repeatedly."""

from __future__ import annotations

import dataclasses
import gc
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, PartitionSpec

from jax_mla_cp.attention import Implementation, resolve_implementation
from jax_mla_cp.batch.form import Form
from jax_mla_cp.batch.packing import DeviceBatch
from jax_mla_cp.batch.step_request import StepRequest
from jax_mla_cp.bench.bench_options import PLAIN, WeightsKind
from jax_mla_cp.bench.data import normal
from jax_mla_cp.bench.mock import MockBuild, is_mocked, mock_build
from jax_mla_cp.bench.random_weights import random_params, replicated
from jax_mla_cp.bench.timing import Agree, Timing, alone, measure
from jax_mla_cp.cache import PAGES_SPEC
from jax_mla_cp.config.model import ModelConfig
from jax_mla_cp.config.quantization import Quantization
from jax_mla_cp.mesh import TOKENS, TP, MeshShape, declared_specs, make_mesh
from jax_mla_cp.model.build import EP_CHOICES
from jax_mla_cp.model.decoder import Decoder
from jax_mla_cp.model.grouped_matmul import resolve_grouped_matmul
from jax_mla_cp.model.loaded_model import Model, param_specs
from jax_mla_cp.step.forward import forward, to_devices
from jax_mla_cp.step.planner import Planner

PAGE_SIZE = 64
FP8_FORMAT = Quantization("fp8", (128, 128))
"""The format of weights in FP8: DeepSeek's."""


def make_build(
    config: ModelConfig,
    mesh: MeshShape,
    ep_axes: str,
    dtype: str,
    attention: Implementation,
    weights: WeightsKind = PLAIN,
) -> MockBuild:
    """Makes the build of a model, as `launch.plan_build` does; with weights in FP8, of a checkpoint as DeepSeek publishes them.

    Raises:
      ConfigError: the attention asked for can't run here.
    """
    resolved = resolve_implementation(attention, config, dtype)
    fp8 = weights.storage == "fp8"
    if fp8:
        config = dataclasses.replace(config, quantization=FP8_FORMAT)
    return mock_build(
        mocked=is_mocked(),
        config=config,
        shape=mesh,
        ep_axes=EP_CHOICES[ep_axes],
        dtype=jnp.dtype(dtype),
        attention=resolved,
        grouped_matmul=resolve_grouped_matmul(),
        fp8=fp8,
        fp8_compute=weights.compute,
    )


def make_model(build: MockBuild, mesh: Mesh | None = None) -> Model:
    """Makes a model with random weights. None: on the first devices."""
    assert build.shape is not None
    mesh = mesh or make_mesh(build.shape)
    return Model(random_params(Decoder(build), mesh), build, mesh)


def prompt(model: Model, planner: Planner, new: int, cached: int = 0, requests: int = 1) -> list[StepRequest]:
    """Makes requests of `new` random tokens after `cached` ones, with pages in random order.

    Tokens are drawn from those whose embeddings the first tp rank keeps: a mocked sum over tp has no others.
    """
    rng = np.random.default_rng(0)
    vocabulary = min(model.config.vocab_size, model.build.padded_vocab // model.build.axes.size(TP))
    each = -(-(cached + new) // planner.shape.cache.page_size)
    pages = rng.permutation(planner.shape.cache.pages_per_layer)[: requests * each].reshape(requests, each)
    return [StepRequest(rng.integers(0, vocabulary, new), cached, pages[i].tolist()) for i in range(requests)]


@dataclasses.dataclass
class Program:
    """A compiled step with its arguments. Each call runs on the cache that the call before left."""

    compiled: jax.stages.Compiled
    model: Model
    pages: jax.Array
    batch: DeviceBatch
    tokens: int
    """Tokens in all ranks' buffers."""

    def __call__(self) -> jax.Array:
        out, self.pages = self.compiled(self.model, self.pages, self.batch)
        return out

    def time(self, samples: int, agree: Agree = alone) -> Timing:
        """Measures the time of a call."""
        return measure(self, samples=samples, agree=agree)

    def set_requests(self, planner: Planner, requests: Sequence[StepRequest]) -> None:
        """Replaces the batch with another of the same shape."""
        self.batch = planner.batch(requests)

    @property
    def memory(self) -> dict[str, float]:
        """GB per device: arguments (weights, cache), temporaries, and both."""
        stats: Any = self.compiled.memory_analysis()
        held = stats.argument_size_in_bytes / 1e9
        beside = (stats.temp_size_in_bytes + stats.output_size_in_bytes - stats.alias_size_in_bytes) / 1e9
        return {"args_gb": held, "temp_gb": beside, "memory_gb": held + beside}


Step = Callable[[Model, jax.Array, DeviceBatch], tuple[jax.Array, jax.Array]]


def compile_program(
    model: Model, planner: Planner, requests: Sequence[StepRequest], *, run: Step = forward, embeds: bool = False
) -> Program:
    """Compiles `run` for a step, with a cache of random latents.

    Args:
      embeds: start from random activations instead of tokens, which skips the embedding.
    """
    host = planner.host_batch([requests])
    batch, tokens = to_devices(model, host), len(host.tokens)
    if embeds:
        assert model.mesh is not None
        local = normal(1, (tokens // planner.shape.cp, model.config.hidden_size), model.build.dtype)
        batch = dataclasses.replace(batch, embeds=replicated(local, model.mesh, PartitionSpec(TOKENS)))
    pages = random_cache(model, planner)
    compiled = jax.jit(run, donate_argnums=1).lower(model, pages, batch).compile()
    return Program(compiled, model, pages, batch, tokens)


def random_cache(model: Model, planner: Planner) -> jax.Array:
    """A cache of random latents, so that prefixes need not be computed."""
    assert model.mesh is not None
    shape = (planner.shape.cache.total_pages, planner.shape.cache.page_size, model.config.latent_dim)
    return replicated(normal(2, shape, model.build.dtype), model.mesh, PAGES_SPEC)


def model_of_part(model_build: MockBuild, name: str, part: nnx.Module) -> tuple[Model, Step]:
    """Makes a model that runs `part` in place of its stack of that name ("dense" or "moe"), and its step.

    The step has neither embedding nor head; it returns the last layer's output after the final norm.
    """
    assert model_build.shape is not None
    mesh = make_mesh(model_build.shape)
    decoder = Decoder(model_build)
    setattr(decoder, name, part)
    graphdef = nnx.graphdef(decoder)
    params = random_params(decoder, mesh)

    def run(model: Model, pages: jax.Array, batch: DeviceBatch) -> tuple[jax.Array, jax.Array]:
        def per_device(params: Any, pages: jax.Array, batch: DeviceBatch) -> tuple[jax.Array, jax.Array]:
            return nnx.merge(graphdef, params)(pages, batch.unpack())

        in_specs = (param_specs(model.params), PAGES_SPEC, declared_specs(batch))
        mapped = jax.shard_map(per_device, mesh=mesh, in_specs=in_specs, out_specs=(PartitionSpec(TOKENS), PAGES_SPEC))
        return mapped(model.params, pages, batch)

    return Model(params, model_build, mesh), run


def make_planner(
    model: Model, tokens: int, *, chunk: int | None = None, requests: int = 1, form: Form = "auto"
) -> Planner:
    """Makes a planner for `requests` requests of up to `tokens` tokens each, with a cache for just these."""
    return Planner.create(
        model,
        cache_tokens=requests * -(-tokens // PAGE_SIZE) * PAGE_SIZE,
        page_size=PAGE_SIZE,
        max_requests=requests,
        max_model_len=tokens,
        prefill_chunk=chunk,
        form=form,
    )


def with_layers(config: ModelConfig, dense: int, moe: int, positions: int) -> ModelConfig:
    """The config with other numbers of layers, and at least `positions` positions."""
    return dataclasses.replace(
        config, num_layers=dense + moe, first_k_dense=dense, max_position=max(config.max_position, positions)
    )


def clean_up() -> None:
    """Frees the arrays of programs no longer used: the next one may need the memory."""
    gc.collect()
