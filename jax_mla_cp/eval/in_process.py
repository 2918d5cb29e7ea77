"""The evaluated model in this process: the server's own engine and step, without HTTP."""

from __future__ import annotations

import dataclasses
import functools
import queue
from collections.abc import Callable, Sequence
from typing import Any

import jax

from jax_mla_cp.config.errors import ConfigError
from jax_mla_cp.engine import Engine, Event, Failed, Finished, Request, SamplingParams, Token
from jax_mla_cp.engine.text import TextStream
from jax_mla_cp.eval.prompts import Prompt
from jax_mla_cp.eval.score import token_logprobs
from jax_mla_cp.eval.target import TargetError
from jax_mla_cp.launch import LaunchOptions, Runner, load_model, make_runner, set_up_devices
from jax_mla_cp.platform import versions
from jax_mla_cp.tokenizer import require_tokenizer

_RUNNING = 2
"""Requests at a time, per dp group: one decodes beside the next one's prefill."""


class InProcess:
    """A loaded model. Implements `jax_mla_cp.eval.target.Target`."""

    def __init__(self, options: LaunchOptions, max_len: int, *, name: str | None = None):
        """Sets up the devices, before JAX's first use, and loads the weights.

        Args:
          max_len: tokens of the longest prompt and its answer.
          name: the model's, in reports. Default: its directory's.

        Raises:
          ConfigError: as `set_up_devices` and `load_model`.
        """
        set_up_devices(options)
        self._options = options
        self._name = name or options.model_name
        self._model, tokenizer = load_model(options)
        self._tokenizer = require_tokenizer(tokenizer)
        self._max_len = max_len

    def facts(self) -> dict[str, Any]:
        build = self._model.build
        return {
            "model": self._name,
            "device": jax.devices()[0].device_kind,
            "devices": self._options.mesh.devices,
            "mesh": str(self._options.mesh),
            "dtype": str(build.dtype),
            "weights": "fp8" if build.fp8 else str(build.dtype),
            "ep_axes": ",".join(build.ep_axes),
            "attention": build.attention,
            "form": self._options.form,
            "prefill_chunk": self._options.prefill_chunk,
            "versions": versions(),
        }

    def answer(self, prompts: Sequence[Prompt], max_tokens: int, done: Callable[[int, int, str], None]) -> None:
        engine = Engine(self._runner())
        events: queue.SimpleQueue[tuple[int, Event]] = queue.SimpleQueue()

        def emit(index: int, event: Event) -> None:
            events.put((index, event))

        for index, prompt in enumerate(prompts):
            engine.submit(self._request(prompt, max_tokens, functools.partial(emit, index)))
        texts = [""] * len(prompts)
        left = len(prompts)
        engine.start()
        try:
            while left:
                index, event = events.get()
                if isinstance(event, Failed):
                    raise TargetError(f"{event.message} The log above says why.")
                if isinstance(event, Token | Finished):
                    texts[index] += event.text
                if isinstance(event, Finished):
                    left -= 1
                    done(index, len(prompts[index].tokens), texts[index])
        finally:
            engine.stop()

    def _runner(self) -> Runner:
        try:
            return make_runner(
                self._model, dataclasses.replace(self._options, max_model_len=self._max_len, max_running=_RUNNING)
            )
        except ConfigError as error:
            raise ConfigError(
                "lengths",
                f"a prompt and answer of {self._max_len} tokens can't be run on these devices. Use shorter ones, "
                f"or more devices. ({error})",
            ) from error

    def _request(self, prompt: Prompt, max_tokens: int, emit: Callable[[Event], None]) -> Request:
        return Request(
            prompt=prompt.tokens,
            max_tokens=max_tokens,
            sampling=SamplingParams(temperature=0),
            stop_tokens=frozenset(self._model.config.eos_token_ids),
            text=TextStream(self._tokenizer),
            emit=emit,
        )

    def logprobs(self, windows: Sequence[Sequence[int]], done: Callable[[], None]) -> list[float]:
        found: list[float] = []
        for values in token_logprobs(
            self._model,
            windows,
            page_size=self._options.page_size,
            prefill_chunk=self._options.prefill_chunk,
            form=self._options.form,
        ):
            found += values.tolist()
            done()
        return found
