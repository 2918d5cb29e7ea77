"""This project's engine in this process, as the server runs it, without HTTP and text."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from typing import Any

import jax

from jax_mla_cp.bench.engine_run import run_requests
from jax_mla_cp.bench.peer.work import TargetFailed
from jax_mla_cp.engine import Engine
from jax_mla_cp.launch import LaunchOptions, load_model, make_runner, set_up_devices, warm_up
from jax_mla_cp.platform import versions


class InProcess:
    """A loaded model. Implements `jax_mla_cp.bench.peer.work.Target`."""

    def __init__(self, options: LaunchOptions, *, max_model_len: int, max_running: int):
        """Sets up the devices, before JAX's first use, and loads the weights.

        Raises:
          ConfigError: as `set_up_devices` and `load_model`, or the cache is too small for the requests.
        """
        devices = set_up_devices(options)
        self._options = options
        self._model, _ = load_model(options, devices)
        sizes = dataclasses.replace(options, max_model_len=max_model_len, max_running=max_running)
        self._runner = make_runner(self._model, sizes, devices)
        warm_up(self._runner)

    @property
    def vocabulary(self) -> int:
        return self._model.config.vocab_size

    def metadata(self) -> dict[str, Any]:
        build = self._model.build
        return {
            "engine": "jax_mla_cp, in process",
            "model": self._options.model_name,
            "device": jax.devices()[0].device_kind,
            "mesh": str(self._options.mesh),
            "weights": "fp8" if build.fp8 else str(build.dtype),
            "attention": build.attention,
            "prefill_chunk": self._options.prefill_chunk,
            "versions": versions(),
        }

    def run(self, prompts: Sequence[list[int]], output_tokens: int) -> float:
        engine = Engine(self._runner)
        began = time.perf_counter()
        try:
            run_requests(engine, prompts, output_tokens)
        except ValueError as error:
            raise TargetFailed(str(error)) from error
        return time.perf_counter() - began
