"""Every operation of /openapi.json answers generated requests as it says. `make soak` sends more of them."""

from __future__ import annotations

import httpx

from tests.clients.schema import fuzz, operations
from tests.live import Live

EXAMPLES = 4
"""Per operation. tests/soak/test_fuzz.py sends hundreds."""


def test_the_server_keeps_to_its_schema(live: Live) -> None:
    found = {f"{each.method.upper()} {each.path}": fuzz(each, EXAMPLES, live.model) for each in operations(live.url)}
    assert {"POST /v1/completions", "GET /v1/models", "GET /health"} <= set(found)
    assert all(sum(statuses.values()) for statuses in found.values()), found
    assert httpx.get(f"{live.url}/health", timeout=30).status_code == 200
