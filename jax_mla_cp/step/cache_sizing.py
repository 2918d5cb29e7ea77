"""`create_runner`: the number of KV cache pages that fit a device beside weights and temporaries, and the runner with them."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import jax

from jax_mla_cp import cache, platform
from jax_mla_cp.batch.form import Form
from jax_mla_cp.config.errors import ConfigError
from jax_mla_cp.mesh import TP
from jax_mla_cp.model.build import Build
from jax_mla_cp.model.loaded_model import Model, weight_bytes
from jax_mla_cp.step import logit_bias
from jax_mla_cp.step.planner import Planner
from jax_mla_cp.step.runner import Runner, compile_step

log = logging.getLogger(__name__)

_PER_TOKEN_SHARE = 0.8
"""Share of the budget that grows with the longest request; the rest is for what a step takes whatever its length."""


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
    smallest_budget: Callable[[int], int] | None = None,
) -> Runner:
    """Sizes the cache and makes the runner.

    Args:
      kv_pages: pages per dp group; None: what the budget leaves after the weights and the largest step's temporaries, but no
        more than `max_running` requests of the maximum length could fill.
      memory_fraction: the budget, as a share of `platform.device_memory`; None: `platform.default_memory_budget`.
      max_model_len: None: the model's, or what the budget and the pages hold.
      max_running: requests at a time, per dp group.
      draft_tokens: as in `Planner.create`.
      smallest_budget: from a device's budget to the smallest of all processes' budgets, whose caches must be equal; None: this process is alone.

    Raises:
      ConfigError: the pages asked for don't fit, or not even one does, or `max_model_len` is more than the pages hold.
    """
    budget = (
        platform.default_memory_budget() if memory_fraction is None else int(platform.device_memory() * memory_fraction)
    )
    if jax.local_devices()[0].platform != "cpu":  # what is free on a CPU no longer holds the weights
        budget -= weight_bytes(model.build)
    if smallest_budget is not None:
        budget = smallest_budget(budget)
    longest = model.config.max_position if max_model_len is None else max_model_len
    if max_model_len is None:
        held = _tokens_that_fit(model.build, budget) if kv_pages is None else kv_pages * page_size
        longest = max(min(longest, held), page_size)
    sizes: dict[str, Any] = {
        "page_size": page_size,
        "max_requests": max_running,
        "prefill_chunk": prefill_chunk,
        "form": form,
        "draft_tokens": draft_tokens,
    }
    # The smallest useful cache: a step's temporaries do not depend on the number of pages.
    probe = Planner.create(model, cache_tokens=longest, max_model_len=longest, **sizes)
    available = _pages_that_fit(probe, budget)
    if kv_pages is None:
        kv_pages = min(max_running * -(-longest // page_size), available)
        if kv_pages < 1:
            raise ConfigError(
                "memory_fraction",
                f"a budget of {max(budget, 0) / 2**30:.1f} GiB a device leaves no room for a single page of the cache: a device "
                f"has {platform.device_memory() / 2**30:.1f} GiB. Use a larger `mesh`, or a smaller `prefill_chunk` or `max_model_len`.",
            )
    elif kv_pages > available:
        raise ConfigError(
            "kv_pages",
            f"must be at most {max(available, 0)}, got {kv_pages}: that many pages of {page_size} tokens fit into a device's "
            f"budget of {max(budget, 0) / 2**30:.1f} GiB (see `memory_fraction`) beside a step's temporaries.",
        )
    held = kv_pages * page_size
    if max_model_len is not None and max_model_len > held:
        raise ConfigError(
            "max_model_len",
            f"must be at most {held}, got {max_model_len}: {kv_pages} pages of {page_size} hold {held} tokens. "
            f"Use max_model_len={held}, or more `kv_pages`.",
        )
    longest = min(longest, held)
    planner = Planner.create(model, cache_tokens=held, max_model_len=longest, **sizes)
    return Runner(planner, prefill_chunk=prefill_chunk, max_running=max_running, max_model_len=longest)


def _tokens_that_fit(build: Build, budget: int) -> int:
    """Length of a request whose latents fit the budget, together with the keys that the expanded form makes of them."""
    c = build.config
    heads = c.num_heads // build.axes.size(TP)
    cached = build.cache_layers * c.latent_dim
    expanded = c.latent_dim + heads * (c.qk_nope_head_dim + c.qk_rope_head_dim + c.v_head_dim)
    return int(budget * _PER_TOKEN_SHARE / ((cached + expanded) * build.dtype.itemsize))


def _pages_that_fit(probe: Planner, budget: int) -> int:
    """Pages that fit the budget beside the temporaries of the planner's largest steps, which are compiled to know them."""
    model = probe.model
    # The last has the most absorbed tokens, but only few of them take decode's kernel and its scratch (attention/fa3.py).
    largest = [probe.prompt_logprobs_shapes[-1], *(probe.step_shapes[-2:-1] if model.build.attention == "fa3" else ())]
    log.info(
        "sizing the KV cache: compiling the largest %d of the programs to measure their memory (about 10 s each; the "
        "compile cache makes later starts faster)",
        len(largest),
    )
    temporaries = max(map(_temporary_bytes, (compile_step(probe, shape) for shape in largest)))
    free = budget - temporaries - logit_bias.device_bytes(model, probe.shape)
    shape = probe.shape.cache
    return int(free // cache.page_bytes(shape.layers, shape.page_size, model.config.latent_dim, model.build.dtype))


def _temporary_bytes(program: jax.stages.Compiled) -> int:
    """Bytes that a step takes on a device beside its arguments."""
    stats: Any = program.memory_analysis()
    return stats.temp_size_in_bytes + stats.output_size_in_bytes - stats.alias_size_in_bytes
