"""A server of the stand-in model."""

from __future__ import annotations

from typing import Any

from jax_mla_cp.engine import Engine
from jax_mla_cp.serve.served_model import ServedModel
from tests.helpers.byte_tokenizer import byte_tokenizer
from tests.helpers.engine_requests import is_idle
from tests.helpers.in_process import serving
from tests.helpers.standin import PageModel
from tests.helpers.waiting import until

MAX_LEN = 600
TOKENIZER = byte_tokenizer()


class PageServer:
    def __init__(self, draft_tokens: int = 0, **served: Any) -> None:
        self.model = PageModel(pages=400, max_running=8, draft_tokens=draft_tokens)
        self.engine = Engine(self.model, max_queued=8)
        # 259 ids, so that BOS (256) is one; the stand-in's answers are below 251. Token 3 is its end of sequence.
        self.served = ServedModel("tiny", self.engine, TOKENIZER, 259, MAX_LEN, (3,), None, **served)
        self._running = serving(self.served)

    def start(self) -> None:
        self.url = self._running.__enter__()

    def stop(self) -> None:
        self._running.__exit__(None, None, None)


def text_of(tokens: list[int]) -> str:
    return TOKENIZER.decode([t for t in tokens if t != 3])


def until_idle(server: PageServer) -> None:
    """Every page has been given back, and no step is in flight."""
    until(lambda: is_idle(server.engine) and server.engine._pipeline.running_since is None)
