"""The evaluation's backend for a model in this process: the server's own engine and step, without HTTP."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import queue
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from numpy.typing import NDArray

from jax_mla_cp.config.errors import ConfigError
from jax_mla_cp.distributed.follower import Follower
from jax_mla_cp.distributed.leader import Leader
from jax_mla_cp.distributed.leading_runner import LeadingRunner
from jax_mla_cp.engine import Engine, Event, Failed, Finished, PromptLogprobs, Request, SamplingParams, Token
from jax_mla_cp.engine.step_runner import StepRunner
from jax_mla_cp.engine.text import TextStream
from jax_mla_cp.eval.backend import BackendError
from jax_mla_cp.eval.corpus import PasskeyPrompt
from jax_mla_cp.launch import (
    LaunchOptions,
    agree_on_programs,
    agree_on_settings,
    load_model,
    make_runner,
    set_up_devices,
)
from jax_mla_cp.platform import versions
from jax_mla_cp.tokenizer import require_tokenizer

_WATCHDOG = 60.0
"""Seconds that a step of several processes may take."""
_MAX_RUNNING = 2
"""Requests at a time, per dp group: one decodes beside the next one's prefill."""


class InProcessBackend:
    """A loaded model. Implements `jax_mla_cp.eval.backend.Backend`. As several processes, process 0 evaluates and the others follow."""

    def __init__(self, options: LaunchOptions, max_model_len: int, *, name: str | None = None):
        """Sets up the devices, before JAX's first use, and loads the weights.

        Args:
          max_model_len: tokens of the longest text, and what is generated after it.
          name: the model's name in reports. Default: its directory's.

        Raises:
          ConfigError: as `set_up_devices`, `load_model` and `agree_on_programs`, or the devices can't run so long a text.
        """
        devices = set_up_devices(options)
        self._options, self._member = options, devices.member
        self._name = name or options.model_name
        with contextlib.nullcontext() if self._member is None else self._member.failing_all():
            agree_on_settings(options, devices)
            self._model, tokenizer = load_model(options, devices)
            self._tokenizer = require_tokenizer(tokenizer)
            sizes = dataclasses.replace(options, max_model_len=max_model_len, max_running=_MAX_RUNNING)
            try:
                self._runner = make_runner(self._model, sizes, devices)
            except ConfigError as error:
                raise ConfigError(
                    "lengths",
                    f"a prompt and answer of {max_model_len} tokens can't be run on these devices. Use shorter ones, "
                    f"or more devices. ({error})",
                ) from error
            agree_on_programs(self._runner, devices)

    def follow(self) -> None:
        """Executes process 0's steps until it ends this process. Returns at once in process 0, or in a process that is alone."""
        if isinstance(self._member, Follower):
            self._member.run(self._runner)

    def close(self) -> int:
        """Ends the processes that follow. Returns 0, or the exit code of a failure of several processes."""
        return self._member.stop() if isinstance(self._member, Leader) else 0

    def metadata(self) -> dict[str, Any]:
        build = self._model.build
        return {
            "model": self._name,
            "device": jax.devices()[0].device_kind,
            "devices": self._options.mesh.devices,
            "mesh": str(self._options.mesh),
            "dtype": str(build.dtype),
            "weights": "fp8" if build.fp8 else str(build.dtype),
            "fp8_compute": build.fp8_compute if build.fp8 else "off",
            "ep_axes": build.ep_name,
            "attention": build.attention,
            "form": self._options.form,
            "prefill_chunk": self._options.prefill_chunk,
            "versions": versions(),
        }

    def generate(
        self, prompts: Sequence[PasskeyPrompt], max_tokens: int, on_done: Callable[[int, int, str], None]
    ) -> None:
        texts = [""] * len(prompts)

        def on_event(index: int, event: Event) -> None:
            if isinstance(event, Token | Finished):
                texts[index] += event.text
            if isinstance(event, Finished):
                on_done(index, len(prompts[index].tokens), texts[index])

        def request(index: int, emit: Callable[[Event], None]) -> Request:
            return Request(
                prompt=prompts[index].tokens,
                max_tokens=max_tokens,
                sampling=SamplingParams(temperature=0),
                stop_tokens=frozenset(self._model.config.eos_token_ids),
                text=TextStream(self._tokenizer),
                emit=emit,
            )

        _run(self._stepper(), len(prompts), request, on_event)

    def prompt_logprobs(self, windows: Sequence[Sequence[int]], on_done: Callable[[], None]) -> list[float]:
        scored = prompt_logprobs(self._stepper(), windows, on_done)
        return [float(value) for values in scored for value in values]

    def _stepper(self) -> StepRunner:
        if not isinstance(self._member, Leader):
            return self._runner
        self._member.watchdog = _WATCHDOG
        return LeadingRunner(self._runner, self._member)


def prompt_logprobs(
    runner: StepRunner, windows: Sequence[Sequence[int]], on_done: Callable[[], None]
) -> list[NDArray[np.float32]]:
    """Scores token sequences with the engine's `prompt_logprobs`: nothing is generated.

    Args:
      windows: token ids, at least 2 each and at most the runner's `max_model_len`.
      on_done: called after each window.

    Returns:
      For each window `[len - 1]`: the log-probability of every token but the first, given those before it.

    Raises:
      BackendError: a step failed.
    """
    found: dict[int, NDArray[np.float32]] = {}

    def on_event(index: int, event: Event) -> None:
        if isinstance(event, PromptLogprobs):
            found[index] = event.logprobs[1:]
        if isinstance(event, Finished):
            on_done()

    def request(index: int, emit: Callable[[Event], None]) -> Request:
        return Request(
            prompt=list(windows[index]),
            max_tokens=0,
            sampling=SamplingParams(temperature=0),
            stop_tokens=frozenset(),
            text=TextStream(None),
            emit=emit,
            prompt_logprobs=True,
        )

    _run(runner, len(windows), request, on_event)
    return [found[index] for index in range(len(windows))]


def _run(
    runner: StepRunner,
    count: int,
    request: Callable[[int, Callable[[Event], None]], Request],
    on_event: Callable[[int, Event], None],
) -> None:
    """Runs requests on an engine until all have finished.

    Args:
      request: makes request number `index`, given its `emit`.
      on_event: called on this thread with `index` and each event of that request but `Failed`.

    Raises:
      BackendError: a request failed.
    """
    events: queue.SimpleQueue[tuple[int, Event]] = queue.SimpleQueue()

    def emit(index: int, event: Event) -> None:
        events.put((index, event))

    engine = Engine(runner)
    for index in range(count):
        engine.submit(request(index, functools.partial(emit, index)))
    unfinished = count
    engine.start()
    try:
        while unfinished:
            index, event = events.get()
            if isinstance(event, Failed):
                raise BackendError(f"{event.message} The log above says why.")
            unfinished -= isinstance(event, Finished)
            on_event(index, event)
    finally:
        engine.stop()
