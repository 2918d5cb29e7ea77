"""A server whose model says what a test wants, for clients that take any OpenAI-compatible one."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.helpers.scripted_model import Script, serving_script
from tests.helpers.tool_call_text import PARSER


@pytest.fixture(scope="module")
def model() -> Script:
    return Script(pages=1000, max_running=8, prefill_chunk=64)


@pytest.fixture(scope="module")
def url(model: Script) -> Iterator[str]:
    """The server's address, without /v1. The model is called "tiny"."""
    with serving_script(model, max_model_len=1500, tool_parser=PARSER) as address:
        yield address
