"""One server of the stand-in model for each file that asks for it."""

from __future__ import annotations

from collections.abc import Iterator

import openai
import pytest

from tests.helpers.page_server import PageServer


@pytest.fixture(scope="module")
def page_server() -> Iterator[PageServer]:
    server = PageServer()
    server.start()
    yield server
    server.stop()


@pytest.fixture(scope="module")
def client(page_server: PageServer) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{page_server.url}/v1", api_key="none", max_retries=0)
