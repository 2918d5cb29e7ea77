"""What a request may be at most, checked on its bytes: before JSON is parsed, before most of them are even read."""

from __future__ import annotations

import asyncio
import re

import numpy as np
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from jax_mla_cp.serve import logs
from jax_mla_cp.serve.errors import ApiError

MAX_BODY = 16 << 20
"""Bytes: a prompt of a million token ids, and room."""
MAX_HEADERS = 128
MAX_HEADER_BYTES = 32 << 10
"""Names and values of all headers; so much of an unfinished header block is kept too (`jax_mla_cp.serve.connection`)."""
MAX_TARGET = 8 << 10
"""Bytes of path and query."""
MAX_DEPTH = 100
"""Arrays and objects in each other: a JSON schema takes two for a level of its own."""
BODY_SECONDS = 60.0
"""For all of a body to arrive."""
_SMALL = 64 << 10


class LimitRequest:
    """ASGI middleware: hands on a whole, bounded, plausible body, or answers why not."""

    def __init__(self, app: ASGIApp, max_body: int = MAX_BODY, body_seconds: float = BODY_SECONDS):
        self._app = app
        self._max_body = max_body
        self._body_seconds = body_seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        try:
            headers = check_head(scope)
            body = await self._read(headers, receive)
            if body:
                check_type(headers)
                if len(body) <= _SMALL:
                    check_json(body)
                else:
                    await asyncio.to_thread(check_json, body)  # up to a tenth of a second: not on the event loop
        except ApiError as error:
            await error.response()(scope, receive, send)
            return
        if body is None:  # the client has gone
            return
        if (entry := logs.current()).content:
            entry.request = body
        whole: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]
        del body  # the application's alone: an answer may take minutes

        async def replay() -> Message:
            return whole.pop() if whole else await receive()

        await self._app(scope, replay, send)

    async def _read(self, headers: dict[bytes, bytes], receive: Receive) -> bytes | None:
        """The body; None if the client went away before its end.

        Raises:
          ApiError: 413 for one that is too large, whether it says so or not; 408 for one that doesn't come.
        """
        declared = headers.get(b"content-length", b"0")
        if declared.isdigit() and int(declared) > self._max_body:
            raise self._too_large()
        parts: list[bytes] = []
        size = 0
        try:
            async with asyncio.timeout(self._body_seconds):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return None
                    parts.append(message.get("body", b""))
                    size += len(parts[-1])
                    if size > self._max_body:
                        raise self._too_large()
                    if not message.get("more_body", False):
                        return b"".join(parts)
        except TimeoutError:
            late = f"The body didn't arrive within {self._body_seconds:g} seconds."
            raise ApiError(408, late, headers={"connection": "close"}) from None

    def _too_large(self) -> ApiError:
        # What is still coming isn't read, so the connection can't be used again.
        message = f"The body is larger than {self._max_body} bytes."
        return ApiError(413, message, headers={"connection": "close"})


def check_head(scope: Scope) -> dict[bytes, bytes]:
    """The headers of a request, if they are few and short (CVE-2025-48956).

    Raises:
      ApiError: 414, 431.
    """
    target = len(scope["raw_path"]) + len(scope["query_string"])
    if target > MAX_TARGET:
        raise ApiError(414, f"The path and query have {target} bytes; at most {MAX_TARGET} are allowed.")
    headers = scope["headers"]
    size = sum(len(name) + len(value) for name, value in headers)
    if len(headers) > MAX_HEADERS or size > MAX_HEADER_BYTES:
        message = (
            f"The request has {len(headers)} headers of {size} bytes; at most {MAX_HEADERS} of {MAX_HEADER_BYTES} bytes "
            "are allowed."
        )
        raise ApiError(431, message)
    return dict(headers)


def check_type(headers: dict[bytes, bytes]) -> None:
    """Only JSON. A web page of a stranger can't send it without asking first, as it could send a form or plain text.

    Raises:
      ApiError: 415.
    """
    kind = headers.get(b"content-type", b"")
    if kind.partition(b";")[0].strip().lower() != b"application/json":
        got = ascii(kind.decode("latin-1"))[:100]
        raise ApiError(415, f"Content-Type must be application/json, got {got}.")
    if (coding := headers.get(b"content-encoding", b"identity").lower()) != b"identity":
        raise ApiError(415, f"Content-Encoding {ascii(coding.decode('latin-1'))[:100]}: bodies are taken as they are.")


# A string, whole or cut off by the end: so the search for the next one starts behind it and the time is linear. The ++ and
# *+ take back nothing, which would make it quadratic.
_STRING = re.compile(rb'"(?:[^"\\]++|\\.)*+(?:"|\\?\Z)', re.DOTALL)
_NOT_A_NUMBER = re.compile(rb"NaN|Infinity")
_BLOCK = 1 << 20  # bytes at a time, or the counts of a body of brackets would take eight times its memory
_STEP = np.zeros(256, np.int8)
_STEP[list(b"[{")] = 1
_STEP[list(b"]}")] = -1


def check_json(body: bytes) -> None:
    """What Python's parser would take though JSON doesn't have it, and what would cost it its stack. The rest is the
    parser's.

    Raises:
      ApiError: 400.
    """
    try:
        body.decode()
    except UnicodeDecodeError as error:
        raise ApiError(400, f"The body is not JSON: byte {error.start} is not UTF-8.") from None
    if b"\0" in body:  # the parser would take it for UTF-16 or UTF-32, in which the checks below would find nothing
        raise ApiError(400, f"The body is not JSON: byte {body.index(0)} is 0.")
    outside = _STRING.sub(b"", body)
    if found := _NOT_A_NUMBER.search(outside):
        raise ApiError(400, f"The body is not JSON: {found[0].decode()} is not a number.")
    depth = deepest = 0
    for start in range(0, len(outside), _BLOCK):
        depths = depth + np.cumsum(_STEP[np.frombuffer(outside[start : start + _BLOCK], np.uint8)], dtype=np.int64)
        depth, deepest = int(depths[-1]), max(deepest, int(depths.max()))
    if deepest > MAX_DEPTH:
        raise ApiError(
            400, f"The body has {deepest} arrays and objects in each other; at most {MAX_DEPTH} are allowed."
        )
