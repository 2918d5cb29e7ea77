"""Log-probabilities of given tokens, in process: through the same plan, cache and model as a serving step."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import jax
import numpy as np
from numpy.typing import NDArray

from jax_mla_cp.batch.arrays import Batch
from jax_mla_cp.batch.form import Form
from jax_mla_cp.batch.step_request import StepRequest
from jax_mla_cp.model.loaded_model import Model
from jax_mla_cp.step.forward import put, score
from jax_mla_cp.step.planner import Planner


def token_logprobs(
    model: Model, windows: Sequence[Sequence[int]], *, page_size: int, prefill_chunk: int, form: Form
) -> Iterator[NDArray[np.float32]]:
    """For each window `[len - 1]`: the log-probability of every token but the first, given those before it.

    Each dp group takes one window at a time, in steps of at most `prefill_chunk` tokens.

    Args:
      windows: token ids, at least 2 each.
      page_size, prefill_chunk, form: as for `Planner.create`.

    Raises:
      ConfigError, ValueError: as the planner does.
    """
    longest = max(map(len, windows)) - 1
    planner = Planner.create(
        model,
        cache_tokens=longest,
        page_size=page_size,
        max_len=longest,
        prefill_chunk=min(prefill_chunk, longest),
        form=form,
    )
    program = jax.jit(score, donate_argnums=1)
    pages = planner.new_cache()
    dp = planner.shape.dp
    for first in range(0, len(windows), dp):
        group = windows[first : first + dp]
        out = [np.empty(len(window) - 1, np.float32) for window in group]
        for start in range(0, max(map(len, out)), prefill_chunk):
            batch = _batch(planner, group, start, start + prefill_chunk)
            scored, pages = program(model, pages, put(model, batch))
            for window, (position, values) in zip(out, _by_group(batch, np.asarray(scored), dp), strict=False):
                window[position] = values
        yield from out


def _batch(planner: Planner, windows: Sequence[Sequence[int]], start: int, stop: int) -> Batch:
    """A step with tokens [start, stop) of each window but its last one, which is predicted and never read."""
    own = range(planner.shape.cache.pages_per_layer)

    def works(window: Sequence[int]) -> list[StepRequest]:
        end = min(stop, len(window) - 1)
        return [StepRequest(window[start:end], start, own, next_token=window[end])] if start < end else []

    groups = [works(window) for window in windows]
    return planner.host_batch(groups + [[]] * (planner.shape.dp - len(groups)))


def _by_group(
    batch: Batch, values: NDArray[np.float32], dp: int
) -> Iterator[tuple[NDArray[np.int32], NDArray[np.float32]]]:
    """(positions, values) of each dp group's tokens, without what only fills the ranks' buffers."""
    ranks = len(batch.num_tokens)
    exists = np.arange(len(values) // ranks) < batch.num_tokens[:, None]
    for mine, position, value in zip(*(x.reshape(dp, -1) for x in (exists, batch.positions, values)), strict=True):
        yield position[mine], value[mine]
