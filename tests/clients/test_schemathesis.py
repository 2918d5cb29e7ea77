"""Every operation of /openapi.json answers generated requests as it says. `make soak` sends more of them."""

from __future__ import annotations

import httpx
import pytest

from tests.helpers.live import Live
from tests.helpers.openapi_schema import fuzz, operations

EXAMPLES = 4
"""Per operation. tests/soak/test_fuzz.py sends hundreds."""


def test_the_server_keeps_to_its_schema(live: Live) -> None:
    found = {f"{each.method.upper()} {each.path}": fuzz(each, EXAMPLES, live.model) for each in operations(live.url)}
    assert {"POST /v1/completions", "GET /v1/models", "GET /health"} <= set(found)
    assert all(sum(statuses.values()) for statuses in found.values()), found
    assert httpx.get(f"{live.url}/health", timeout=30).status_code == 200


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_a_stream_keeps_to_it_too(live: Live, path: str) -> None:
    """Generated requests seldom are valid and stream."""
    operation = next(each for each in operations(live.url) if each.path == path)
    asked = {"prompt": "Hello"} if path == "/v1/completions" else {"messages": [{"role": "user", "content": "Hello"}]}
    case = operation.Case(body={"model": live.model, "max_tokens": 3, "stream": True, **asked})
    answer = case.call_and_validate(timeout=60)
    assert answer.headers["content-type"][0].startswith("text/event-stream") and b"[DONE]" in answer.content
