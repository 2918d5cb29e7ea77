"""From loaded weights to a runner, and its programs compiled."""

from __future__ import annotations

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from jax_mla_cp.launch.devices import Devices
from jax_mla_cp.launch.options import LaunchOptions
from jax_mla_cp.model.loaded_model import Model
from jax_mla_cp.step.cache_sizing import create_runner
from jax_mla_cp.step.runner import Runner


def make_runner(model: Model, options: LaunchOptions, devices: Devices) -> Runner:
    """Makes the cache and the runner for a model of `load_model`. Several processes' smallest device decides their caches' size.

    Raises:
      ConfigError: as `create_runner`.
    """
    return create_runner(
        model,
        page_size=options.page_size,
        kv_pages=options.kv_pages,
        memory_fraction=options.memory_fraction,
        prefill_chunk=options.prefill_chunk,
        max_model_len=options.max_model_len,
        max_running=options.max_running,
        form=options.form,
        draft_tokens=options.draft_tokens or 0,
        smallest_budget=None if devices.member is None else devices.member.cluster.smallest_budget,
    )


def warm_up(runner: Runner) -> None:
    """Compiles all of a runner's programs, with a progress bar on stderr."""
    columns = (TextColumn("compiling"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        runner.warmup(progress.track)
