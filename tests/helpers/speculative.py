"""A small model with an MTP layer that is often, but not always, right; and an engine that runs requests on it."""

from __future__ import annotations

import dataclasses
import functools
import queue
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jax_mla_cp.batch.arrays import Batch
from jax_mla_cp.batch.form import Form
from jax_mla_cp.batch.step_request import SamplingParams, StepRequest
from jax_mla_cp.checkpoint import load_params
from jax_mla_cp.config.model import ModelConfig
from jax_mla_cp.engine import Engine, Event, Finished, Request, SpeculationStats, Token
from jax_mla_cp.engine.text import TextStream
from jax_mla_cp.mesh import make_mesh, mesh_shape, on_devices
from jax_mla_cp.model.build import EP_CHOICES, Build
from jax_mla_cp.model.decoder import Decoder
from jax_mla_cp.model.grouped_matmul import resolve_grouped_matmul
from jax_mla_cp.model.loaded_model import Model
from jax_mla_cp.step.forward import SLOTS_SPEC, to_devices
from jax_mla_cp.step.planner import Planner
from jax_mla_cp.step.results import RunnerOutput, StepResult
from jax_mla_cp.step.runner import Runner
from jax_mla_cp.step.synchronous_runner import SynchronousRunner
from tests.helpers.array_source import ArraySource
from tests.helpers.engine_requests import is_idle
from tests.helpers.random_weights import random_weights
from tests.helpers.synthetic import CONFIG as SYNTHETIC
from tests.helpers.synthetic import REAL_DIMS_CONFIG, step_of

CONFIG = dataclasses.replace(
    SYNTHETIC,
    vocab_size=12,
    hidden_size=32,
    num_layers=2,
    first_k_dense=0,
    num_heads=4,
    q_lora_rank=16,
    kv_lora_rank=16,
    intermediate_size=32,
    moe_intermediate_size=16,
    num_mtp_layers=1,
)
REAL_DIMS: dict[str, Any] = {
    "config": dataclasses.replace(REAL_DIMS_CONFIG, num_layers=2, first_k_dense=0, num_mtp_layers=1),
    "dtype": jnp.dtype(jnp.bfloat16),
    "noise": 5.0,
}
"""A model for the kernels: far from ties, so that bfloat16 says the same in any batch; half of its drafts hold."""

PAGE, RUNNING, CHUNK = 4, 12, 10


@functools.cache
def weights(config: ModelConfig = CONFIG, added: float = 1.0, noise: float = 1.0) -> dict[str, np.ndarray]:
    """Under Hugging Face names. Tokens follow each other in a circle, unless the layers add something else to them, which
    they do `added` times; the MTP layer sees the next token, and some of the state by way of random numbers, the `noise`, so
    that it is right now and then."""
    made = dict(random_weights(config, 0, mtp=True))
    rng = np.random.default_rng(3)
    width = config.hidden_size
    embed = np.linalg.qr(rng.normal(size=(width, config.vocab_size)))[0].T * np.sqrt(width)
    made["model.embed_tokens.weight"] = embed
    made["lm_head.weight"] = np.roll(embed, 1, axis=0) / np.sqrt(width)
    mixed = noise * rng.normal(size=(width, width)) / np.sqrt(width)
    made[f"model.layers.{config.num_layers}.eh_proj.weight"] = np.concatenate([np.eye(width), mixed], axis=1)
    last = ("o_proj.weight", "down_proj.weight")
    return {name: (added * value if name.endswith(last) else value).astype(np.float32) for name, value in made.items()}


def model(
    mesh: str | None = None,
    ep: str = "tp",
    config: ModelConfig = CONFIG,
    added: float = 1.0,
    noise: float = 1.0,
    **build: object,
) -> Model:
    on = None if mesh is None else make_mesh(mesh)
    shape = None if on is None else mesh_shape(on)
    build = {"grouped_matmul": resolve_grouped_matmul(), **build}
    built = Build(config, shape, EP_CHOICES[ep], mtp=True, **build)  # type: ignore[arg-type]
    return Model(
        load_params(ArraySource(weights(config, added, noise)), nnx.state(Decoder(built)), config, on), built, on
    )


class OneBucket(Runner):
    """A runner whose steps are of one size and can be looked into."""

    def __init__(
        self, model: Model, draft_tokens: int, *, page: int = PAGE, max_model_len: int = 64, form: Form = "absorbed"
    ):
        made = Planner.create(
            model,
            cache_tokens=RUNNING * max_model_len,
            page_size=page,
            max_requests=RUNNING,
            max_model_len=max_model_len,
            prefill_chunk=CHUNK,
            form=form,
            draft_tokens=draft_tokens,
        )
        made = dataclasses.replace(made, buckets=made.buckets[-1:])
        super().__init__(made, prefill_chunk=CHUNK, max_running=RUNNING, max_model_len=max_model_len)

    @property
    def program(self) -> jax.stages.Compiled:
        """The largest: all of them with `form="absorbed"`, with "expanded" that with keys."""
        return self._program(self.planner.step_shapes[-1])

    def propose(self, batch: Batch) -> np.ndarray:
        """Runs a batch as it is, with its page table: drafts [dp, I, d]."""
        model = self.planner.model
        step = step_of(self.planner, batch)
        page_table = on_devices(batch.page_table, SLOTS_SPEC, model.mesh)
        changes = self.planner.dummy_batch(step, keeps_table=True).table_changes
        batch = dataclasses.replace(batch, page_table=None, table_changes=changes)
        sampled, self._pages, *_ = self._program(step)(
            model, self._pages, to_devices(model, batch), self._bias_builder.neutral, self._last_tokens, page_table
        )
        return np.asarray(sampled.drafts).reshape(self.dp, -1, self.draft_tokens)

    def poison(self) -> None:
        """The whole cache becomes NaN."""
        self._pages = jax.jit(lambda pages: pages * jnp.nan, donate_argnums=0)(self._pages)

    def pages(self) -> np.ndarray:
        return np.asarray(self._pages)

    def latents(self, group: int, pages: Sequence[int]) -> list[np.ndarray]:
        """[layers, tokens, R + r] in a dp group's pages, as each of its devices has them."""
        cache, found = self.planner.shape.cache, []
        for shard in self._pages.addressable_shards:
            if (shard.index[0].start or 0) == group * cache.total_pages:
                data = np.asarray(shard.data).reshape(cache.layers, cache.pages_per_layer, cache.page_size, -1)
                found.append(data[:, list(pages)].reshape(cache.layers, -1, data.shape[-1]))
        return found


class Watched(SynchronousRunner):
    """A runner that calls `look` with every request of a step and its result, which `look` may change."""

    def __init__(self, runner: Runner, look: Callable[[StepRequest, StepResult], object]):
        self._runner, self._look = runner, look

    def __getattr__(self, name: str) -> Any:
        return getattr(self._runner, name)

    def step(self, groups: Sequence[Sequence[StepRequest]]) -> RunnerOutput:
        output = self._runner.step(groups)
        for requests, results in zip(groups, output.results, strict=True):
            for request, result in zip(requests, results, strict=True):
                self._look(request, result)
        return output


@dataclasses.dataclass
class Run:
    """The output of an engine for some requests."""

    tokens: list[list[int]]
    logprobs: list[list[float]]
    speculation: SpeculationStats | None
    idle: bool
    """All pages have been released."""


def generate(
    runner: Runner | Watched,
    prompts: Sequence[Sequence[int]],
    count: int | Sequence[int],
    sampling: Sequence[SamplingParams] | None = None,
) -> Run:
    """`count` tokens for each prompt, greedy by default. All requests arrive at once."""
    events: queue.Queue[tuple[int, Event]] = queue.Queue()
    engine = Engine(runner)
    counts = [count] * len(prompts) if isinstance(count, int) else count
    for i, (prompt, max_tokens) in enumerate(zip(prompts, counts, strict=True)):
        params = sampling[i] if sampling else SamplingParams(temperature=0)
        text, emit = TextStream(None), functools.partial(lambda i, event: events.put((i, event)), i)
        engine.submit(Request(list(prompt), max_tokens, params, frozenset(), text, emit))
    engine.start()
    run = Run([[] for _ in prompts], [[] for _ in prompts], None, False)
    left = len(prompts)
    while left:
        i, event = events.get(timeout=120)
        if isinstance(event, Token):
            run.tokens[i].append(event.token)
            run.logprobs[i].append(event.logprob)
        else:
            assert isinstance(event, Finished) and event.reason == "length", event
            left -= 1
    engine.stop(timeout=60)
    return dataclasses.replace(run, speculation=engine.status().speculation, idle=is_idle(engine))
