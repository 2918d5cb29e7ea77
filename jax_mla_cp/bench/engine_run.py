"""Running requests on an engine in this process."""

from __future__ import annotations

import threading
from collections.abc import Sequence

from jax_mla_cp.batch.step_request import SamplingParams
from jax_mla_cp.engine.engine import Engine
from jax_mla_cp.engine.observer import StepReport
from jax_mla_cp.engine.request import Event, Failed, Finished, Request
from jax_mla_cp.engine.text import TextStream
from jax_mla_cp.tokenizer import Tokenizer


def run_requests(
    engine: Engine, prompts: Sequence[list[int]], output_tokens: int, tokenizer: Tokenizer | None = None
) -> None:
    """Starts the engine, runs a greedy request for each prompt, all at once, and stops the engine.

    Args:
      output_tokens: tokens that each request generates; none ends sooner.
      tokenizer: detokenizes the output; None: no text is made.

    Raises:
      ValueError: a request was refused or failed.
    """
    done, failed = threading.Semaphore(0), []

    def emit(event: Event) -> None:
        if isinstance(event, Failed):
            failed.append(event.message)
        if isinstance(event, Failed | Finished):
            done.release()

    engine.submit_all(
        [
            Request(prompt, output_tokens, SamplingParams(), frozenset(), TextStream(tokenizer), emit)
            for prompt in prompts
        ]
    )
    engine.start()
    for _ in prompts:
        done.acquire()
    engine.stop()
    if failed:
        raise ValueError(f"a request failed: {failed[0]}")


def all_decoding(reports: Sequence[StepReport], requests: int) -> list[StepReport]:
    """The steps in which all requests decoded and none was prefilled."""
    return [r for r in reports if r.decode_tokens == requests and not r.prefill_tokens]
