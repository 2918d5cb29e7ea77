"""Random models and requests for tests of the step: the same weights on every mesh, and a driver that keeps the pages."""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Sequence

import jax
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding

from jax_mla_cp.batch.arrays import Batch
from jax_mla_cp.batch.layout import GroupLayout, StepLayout
from jax_mla_cp.batch.shapes import StepShape
from jax_mla_cp.batch.step_request import StepRequest
from jax_mla_cp.config.model import ModelConfig
from jax_mla_cp.config.rope import RopeConfig
from jax_mla_cp.mesh import make_mesh, mesh_shape
from jax_mla_cp.model.build import EP_CHOICES, Build
from jax_mla_cp.model.decoder import Decoder
from jax_mla_cp.model.grouped_matmul import resolve_grouped_matmul
from jax_mla_cp.model.loaded_model import Model
from jax_mla_cp.step.forward import forward
from jax_mla_cp.step.planner import Planner

CONFIG = ModelConfig(
    vocab_size=250,
    hidden_size=64,
    num_layers=3,
    num_heads=8,
    q_lora_rank=32,
    kv_lora_rank=32,
    qk_rope_head_dim=8,
    qk_nope_head_dim=16,
    v_head_dim=16,
    intermediate_size=128,
    first_k_dense=1,
    moe_intermediate_size=32,
    n_routed_experts=8,
    n_shared_experts=1,
    experts_per_token=2,
    n_group=4,
    topk_group=2,
    norm_topk_prob=True,
    routed_scaling_factor=2.5,
    rms_norm_eps=1e-6,
    max_position=512,
    rope=RopeConfig(factor=4, original_max_position=128, mscale=1, mscale_all_dim=1, yarn=True),
)

REAL_DIMS_CONFIG = dataclasses.replace(
    CONFIG,
    hidden_size=256,
    num_layers=4,
    q_lora_rank=64,
    kv_lora_rank=512,
    qk_rope_head_dim=64,
    qk_nope_head_dim=128,
    v_head_dim=128,
    moe_intermediate_size=64,
)
"""Heads and latents as large as DeepSeek-V3's, which the kernels are for."""


def random_model(mesh: str | None = None, ep: str = "tp", config: ModelConfig = CONFIG, **build: object) -> Model:
    """A model whose weights depend on the config alone: what only pads a shape for the mesh is zero."""
    on = None if mesh is None else make_mesh(mesh)
    shape = None if on is None else mesh_shape(on)
    build = {"grouped_matmul": resolve_grouped_matmul(), **build}
    built = Build(config, shape, EP_CHOICES[ep], **build)  # type: ignore[arg-type]
    real = dict(_shapes(Build(config, mtp=built.mtp)))

    def fill(path: tuple[object, ...], param: nnx.Param) -> nnx.Param:
        name = jax.tree_util.keystr(path)
        value = np.zeros(param.get_value().shape, np.float32)
        spread, mean = (0.1, 1.0) if "norm" in name else (0.2, 0.0)
        rng = np.random.default_rng(zlib.crc32(name.encode()))
        value[tuple(map(slice, real[name]))] = rng.normal(mean, spread, real[name])
        value = value.astype(param.get_value().dtype)
        place = None if on is None else NamedSharding(on, param.get_metadata("spec"))
        return param.replace(jax.device_put(value, place))

    params = jax.tree_util.tree_map_with_path(
        fill, nnx.state(Decoder(built)), is_leaf=lambda p: isinstance(p, nnx.Param)
    )
    return Model(params, built, on)


def tempered(model: Model) -> Model:
    """Matrices a quarter as large, which bfloat16 does exactly: with these widths they would make every softmax a choice
    of one key and saturate the router, and the model would amplify any rounding."""

    def shrink(path: tuple[object, ...], x: jax.Array) -> jax.Array:
        return x if "norm" in jax.tree_util.keystr(path) else x / 4

    return dataclasses.replace(model, params=jax.tree_util.tree_map_with_path(shrink, model.params))


def _shapes(build: Build) -> list[tuple[str, tuple[int, ...]]]:
    flat = jax.tree_util.tree_leaves_with_path(nnx.state(Decoder(build)), is_leaf=lambda p: isinstance(p, nnx.Param))
    return [(jax.tree_util.keystr(path), param.get_value().shape) for path, param in flat]


def step_layout(groups: Sequence[GroupLayout], step: StepShape) -> StepLayout:
    """A step of these groups, with the load of their plans."""
    plans = [group.plan for group in groups]
    return StepLayout(groups, step, sum(p.rank_tokens for p in plans), sum(p.rank_pairs() for p in plans))


def step_of(planner: Planner, batch: Batch) -> StepShape:
    """The shape of a host batch, told from its arrays."""
    shape = planner.shape
    tokens = batch.tokens.shape[0] // (shape.dp * shape.cp)
    keys = batch.key_pages.shape[0] // shape.dp * shape.cache.page_size
    return StepShape(tokens, batch.absorbed_tokens, keys)


@dataclasses.dataclass
class Request:
    """A request of the driver: where it lives, and what has been computed of it."""

    group: int
    pages: list[int]
    tokens: list[int] = dataclasses.field(default_factory=list)


class Driver:
    """Runs requests step by step and returns each one's logits; every request keeps its own pages."""

    def __init__(
        self,
        model: Model,
        *,
        page_size: int = 16,
        max_requests: int = 4,
        max_model_len: int = 256,
        form: str = "auto",
        spare: int = 3,
        chunk: int | None = None,
        seed: int = 0,
    ):
        width = -(-max_model_len // page_size)
        self.model = model
        self.planner = Planner.create(
            model,
            cache_tokens=(width * max_requests + spare) * page_size,
            page_size=page_size,
            max_requests=max_requests,
            max_model_len=max_model_len,
            prefill_chunk=chunk,
            form=form,  # type: ignore[arg-type]
        )
        self.pages = self.planner.new_cache()
        pages = self.planner.shape.cache.pages_per_layer
        rng = np.random.default_rng(seed)
        self._free = [rng.permutation(pages).tolist() for _ in range(self.planner.shape.dp)]
        self._width = width
        self._forward = jax.jit(forward, donate_argnums=1)

    def request(self, group: int = 0) -> Request:
        return Request(group, [self._free[group].pop() for _ in range(self._width)])

    def step(self, news: Sequence[tuple[Request, Sequence[int]]]) -> np.ndarray:
        """Appends new tokens to requests, in one step; returns [requests, vocab] logits after each one's last."""
        groups: list[list[StepRequest]] = [[] for _ in range(self.planner.shape.dp)]
        rows = []
        for request, tokens in news:
            rows.append(request.group * self.planner.shape.max_requests + len(groups[request.group]))
            groups[request.group].append(StepRequest(list(tokens), len(request.tokens), request.pages))
            request.tokens += tokens
        logits, self.pages = self._forward(self.model, self.pages, self.planner.batch(groups))
        return np.asarray(logits)[rows, : self.model.config.vocab_size]

    def latents(self, request: Request, shard: np.ndarray | None = None) -> np.ndarray:
        """[layers, tokens, R + r] of a request, from the whole cache or one device's copy of its dp group's part."""
        cache = self.planner.shape.cache
        pages = np.asarray(self.pages) if shard is None else shard
        pages = pages.reshape(-1, cache.layers, cache.pages_per_layer, cache.page_size, pages.shape[-1])
        mine = pages[request.group if shard is None else 0][:, request.pages]
        return mine.reshape(cache.layers, -1, pages.shape[-1])[:, : len(request.tokens)]
