"""One of several processes with one mesh: `python -m tests.helpers.distributed_worker ADDRESS COUNT INDEX CHECKPOINT OUT`."""

from __future__ import annotations

import sys

import jax
import numpy as np
from jax.experimental import multihost_utils

import jax_mla_cp as mla


def main(address: str, count: str, index: str, checkpoint: str, out: str) -> None:
    jax.config.update("jax_num_cpu_devices", 8 // int(count))
    if int(count) > 1:
        jax.distributed.initialize(address, int(count), int(index))
    model, _ = mla.load(checkpoint, mesh=mla.make_mesh("tp=2,cp=4"), dtype="float32", ep_axes="tp,cp", progress=False)
    planner = mla.Planner.create(model, cache_tokens=256, page_size=16, max_requests=2, form="expanded")
    run = jax.jit(mla.forward, donate_argnums=1)
    pages = planner.new_cache()
    prompts, results = [list(range(1, 100)), [7, 8, 9]], []
    for works in (
        [mla.StepRequest(prompts[0], 0, range(8)), mla.StepRequest(prompts[1], 0, [8])],  # prefill
        [mla.StepRequest([5], 99, range(8)), mla.StepRequest([6], 3, [8])],  # decode
    ):
        logits, pages = run(model, pages, planner.batch(works))
        results.append(multihost_utils.process_allgather(logits, tiled=True)[:2])
    if int(index) == 0:
        np.save(out, np.stack(results))


if __name__ == "__main__":
    main(*sys.argv[1:])
