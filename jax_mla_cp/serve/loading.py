"""From options to a model that is ready to run: weights, KV cache and programs, with a log line for each stage."""

from __future__ import annotations

import dataclasses
import logging
import time
from pathlib import Path

from rich.filesize import decimal

from jax_mla_cp.default_model import DIRECTORY
from jax_mla_cp.launch import Devices, Runner, agree_on_programs, agree_on_settings, load_model, make_runner, warm_up
from jax_mla_cp.serve.server_options import ServerOptions
from jax_mla_cp.tokenizer import Tokenizer

log = logging.getLogger(__name__)

_ATTENTION = {"fa3": "FlashAttention-3", "xla": "XLA"}


@dataclasses.dataclass(frozen=True)
class Loaded:
    """A model whose steps can run."""

    runner: Runner
    tokenizer: Tokenizer | None


def load(config: ServerOptions, devices: Devices) -> Loaded:
    """Loads the model and makes its runner; compiles its programs if the options say so. Several processes do the same.

    Raises:
      ConfigError: as `load_model`, `make_runner`, `agree_on_settings` and `agree_on_programs`.
    """
    began = time.perf_counter()
    agree_on_settings(config, devices, warmup=config.warmup)
    directory = config.model or DIRECTORY
    log.info("reading weights: %s from %s", decimal(_bytes_on_disk(directory)), directory)
    model, tokenizer = load_model(config, devices)
    log.info(
        "loaded %s: %s%s, experts sharded over %s, attention kernel %s (%.1f s)",
        config.model or "the built-in model (a small demo: it finds pass keys and continues technical English)",
        model.build.dtype,
        f", weights in FP8 ({model.build.fp8_compute})" if model.build.fp8 else "",
        model.build.ep_name,
        _ATTENTION[model.build.attention],
        time.perf_counter() - began,
    )
    runner = make_runner(model, config, devices)
    agree_on_programs(runner, devices)
    log.info(
        "KV cache: %d pages of %d tokens per dp group; max_model_len %d; up to %d running requests",
        runner.pages_per_group,
        runner.page_size,
        runner.max_model_len,
        runner.max_running * runner.dp,
    )
    log.info(runner.grid)
    if config.warmup or (config.warmup is None and devices.platform == "cuda"):
        log.info(
            "warmup: compiling all programs (8 to 16 s each on a GPU; the compile cache makes later starts faster)"
        )
        warm_up(runner)
    else:
        log.info(
            "no warmup: each program is compiled at its first use, while requests wait (--warmup compiles all now)"
        )
    return Loaded(runner, tokenizer)


def _bytes_on_disk(directory: Path) -> int:
    return sum(file.stat().st_size for file in directory.rglob("*") if file.is_file())
