"""The step: one `shard_map` around the model, and the sampler behind it.

`forward` is what a notebook jits; `step` is what the server runs. Both are plain functions of (model, pages, batch).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float

from jax_mla_cp.batch import Batch, batch_specs
from jax_mla_cp.cache import PAGES_SPEC
from jax_mla_cp.mesh import CP, TOKENS
from jax_mla_cp.model.decoder import Decoder
from jax_mla_cp.model.handle import Model, param_specs
from jax_mla_cp.sampling import SampledArrays, sample


def forward(
    model: Model, pages: Float[Array, "pages page_size C"], batch: Batch
) -> tuple[Float[Array, "I Vp"], jax.Array]:
    """Runs a batch: logits after each request's last token, and the cache with the step's latents.

    Jit it with the cache donated, `jax.jit(forward, donate_argnums=1)`, or every call copies the cache.

    Returns:
      float32 logits, one row per place of the batch in its own order (see `Planner.batch`), padded vocabulary at -inf,
      sharded P(("dp", "cp")); and the cache, sharded as before.
    """
    return _run(_last_logits, (PartitionSpec(TOKENS), PAGES_SPEC), model, pages, batch)


def step(model: Model, pages: jax.Array, batch: Batch) -> tuple[SampledArrays, jax.Array]:
    """`forward`, and a token sampled for each request."""

    def run(decoder: Decoder, pages: jax.Array, batch: Batch) -> tuple[SampledArrays, jax.Array]:
        logits, pages = _last_logits(decoder, pages, batch)
        with jax.named_scope("sample"):
            return sample(logits[:, : model.config.vocab_size], batch.sampling), pages

    return _run(run, (PartitionSpec(TOKENS), PAGES_SPEC), model, pages, batch)


def _last_logits(decoder: Decoder, pages: jax.Array, batch: Batch) -> tuple[jax.Array, jax.Array]:
    """Per device. Each cp rank brings the last tokens that it has; each gets the sum for its share of the requests."""
    x, pages = decoder(pages, batch)
    with jax.named_scope("head"):
        last = x.at[batch.last_index].get(mode="fill", fill_value=0)
        return decoder.logits(decoder.build.axes.psum_scatter(last, CP)), pages


def _run(per_device: Callable[..., Any], out_specs: Any, model: Model, pages: jax.Array, batch: Batch) -> Any:
    def run(params: Any, pages: jax.Array, batch: Batch) -> Any:
        return per_device(model.decoder(params), pages, batch)

    if model.mesh is None:
        return run(model.params, pages, batch)
    in_specs = (param_specs(model.params), PAGES_SPEC, batch_specs(batch))
    mapped = jax.shard_map(run, mesh=model.mesh, in_specs=in_specs, out_specs=out_specs)
    return mapped(model.params, pages, batch)


def put(model: Model, batch: Batch) -> Batch:
    """A host batch onto the model's devices that are this process's. Every process must pass the same one."""
    mesh = model.mesh
    if mesh is None:
        return jax.device_put(batch)
    shardings = jax.tree.map(lambda spec: NamedSharding(mesh, spec), batch_specs(batch))
    if not mesh.is_multi_process:
        return jax.device_put(batch, shardings)

    def place(x: np.ndarray, sharding: NamedSharding) -> jax.Array:
        return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])

    return jax.tree.map(place, batch, shardings)
