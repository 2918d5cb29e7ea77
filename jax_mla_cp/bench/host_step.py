"""The decode steps of `host`: their planner and requests."""

from __future__ import annotations

import numpy as np
from jax.sharding import AbstractMesh, Mesh

from jax_mla_cp.batch.step_request import SamplingParams, StepRequest
from jax_mla_cp.bench.bench_options import Options
from jax_mla_cp.bench.program import PAGE_SIZE
from jax_mla_cp.config.model import ModelConfig
from jax_mla_cp.model.build import Build
from jax_mla_cp.model.loaded_model import Model
from jax_mla_cp.step.planner import Planner


def make_planner(options: Options, config: ModelConfig, mesh: Mesh | AbstractMesh) -> Planner:
    """Makes a planner for the largest of the rows' steps, of a model without weights.

    Args:
      mesh: an abstract one if no array is to be placed on a device.
    """
    # An abstract mesh has the axes and sizes of one, which are all that a planner reads.
    model = Model({}, Build(config, options.mesh), mesh)  # type: ignore[arg-type]
    most, longest = (max(sizes) for sizes in zip(*options.shapes, strict=True))
    return Planner.create(
        model,
        cache_tokens=most * -(-longest // PAGE_SIZE) * PAGE_SIZE,
        page_size=PAGE_SIZE,
        max_requests=most,
        max_model_len=longest,
        prefill_chunk=min(8192, longest),
    )


def decoding(planner: Planner, requests: int, context: int) -> list[list[StepRequest]]:
    """Makes the requests of a step in which all decode, the new token being the last of `context`; pages in random order."""
    each = -(-context // PAGE_SIZE)
    pages = np.random.default_rng(0).permutation(planner.shape.cache.pages_per_layer)[: requests * each]
    return [
        [
            StepRequest([1], context - 1, row.tolist(), SamplingParams(seed=i), slot=i)
            for i, row in enumerate(pages.reshape(requests, each))
        ]
    ]
