"""Request size limits, enforced on the raw bytes before JSON is parsed."""

from __future__ import annotations

import asyncio
import re

import numpy as np
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from jax_mla_cp.serve import logs
from jax_mla_cp.serve.errors import ApiError

MAX_BODY = 16 << 20
"""Bytes: enough for a prompt of a million token ids."""
MAX_HEADERS = 128
MAX_HEADER_BYTES = 32 << 10
"""Bytes of all header names and values; also uvicorn's limit for an incomplete header block."""
MAX_TARGET = 8 << 10
"""Bytes of path and query."""
MAX_DEPTH = 100
"""Levels of nested arrays and objects. A JSON schema takes two levels for one of its own."""
MAX_CONTAINERS = 32 << 10
"""Arrays and objects in a body: validating each takes some microseconds of the event loop. 4096 messages with two tool calls each
have 28,672."""
BODY_SECONDS = 60.0
"""Maximum time until a body has arrived."""
_SMALL = 64 << 10


class LimitRequestSize:
    """ASGI middleware: reads the whole body and passes it on, or rejects a request that exceeds a limit or is not JSON."""

    def __init__(self, app: ASGIApp, max_body: int = MAX_BODY, body_seconds: float = BODY_SECONDS):
        self._app = app
        self._max_body = max_body
        self._body_seconds = body_seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        try:
            headers = check_target_and_headers(scope)
            body = await self._read(headers, receive)
            if body:
                check_content_type(headers)
                if len(body) <= _SMALL:
                    check_json(body)
                else:
                    await asyncio.to_thread(check_json, body)  # takes up to 0.1 s, which would block the event loop
        except ApiError as error:
            await error.response()(scope, receive, send)
            return
        if body is None:  # the client disconnected
            return
        if (entry := logs.current()).content:
            entry.request = body
        whole: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]
        del body  # so that only the application holds it: a response may take minutes

        async def replay() -> Message:
            return whole.pop() if whole else await receive()

        await self._app(scope, replay, send)

    async def _read(self, headers: dict[bytes, bytes], receive: Receive) -> bytes | None:
        """Reads the body; None if the client disconnected first.

        Raises:
          ApiError: 413 for a body that is too large, with or without Content-Length; 408 for one that arrives too slowly.
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
            late = f"The body did not arrive within {self._body_seconds:g} seconds."
            raise ApiError(408, late, headers={"connection": "close"}) from None

    def _too_large(self) -> ApiError:
        # The rest of the body is not read, so the connection can't be reused.
        message = f"The body exceeds the limit of {self._max_body} bytes."
        return ApiError(413, message, headers={"connection": "close"})


def check_target_and_headers(scope: Scope) -> dict[bytes, bytes]:
    """Checks the sizes of target and headers and returns the headers (CVE-2025-48956).

    Raises:
      ApiError: 414, 431.
    """
    target = len(scope["raw_path"]) + len(scope["query_string"])
    if target > MAX_TARGET:
        raise ApiError(414, f"The path and query have {target} bytes; the limit is {MAX_TARGET}.")
    headers = scope["headers"]
    size = sum(len(name) + len(value) for name, value in headers)
    if len(headers) > MAX_HEADERS or size > MAX_HEADER_BYTES:
        message = (
            f"The request has {len(headers)} headers with {size} bytes; the limits are {MAX_HEADERS} headers and "
            f"{MAX_HEADER_BYTES} bytes."
        )
        raise ApiError(431, message)
    return dict(headers)


def check_content_type(headers: dict[bytes, bytes]) -> None:
    """Accepts only uncompressed JSON. A foreign web page can't send JSON without a CORS preflight, unlike forms and plain text.

    Raises:
      ApiError: 415.
    """
    kind = headers.get(b"content-type", b"")
    if kind.partition(b";")[0].strip().lower() != b"application/json":
        got = ascii(kind.decode("latin-1"))[:100]
        raise ApiError(415, f"Content-Type must be application/json, got {got}.")
    if (coding := headers.get(b"content-encoding", b"identity").lower()) != b"identity":
        raise ApiError(415, f"Content-Encoding {ascii(coding.decode('latin-1'))[:100]} is not supported.")


# A string, complete or cut off by the end of the body, so that each search continues after the last match. The possessive
# ++ and *+ never backtrack. Both keep the time linear.
_STRING = re.compile(rb'"(?:[^"\\]++|\\.)*+(?:"|\\?\Z)', re.DOTALL)
_NOT_A_NUMBER = re.compile(rb"NaN|Infinity")
_BLOCK = 1 << 20  # bytes at a time: the int64 depths of a whole body would take eight times its memory
_STEP = np.zeros(256, np.int8)
_STEP[list(b"[{")] = 1
_STEP[list(b"]}")] = -1


def check_json(body: bytes) -> None:
    """Rejects what Python's parser accepts although it is not JSON, nesting that would overflow its stack, and more arrays and
    objects than the event loop has time for. Other errors are left to the parser.

    Raises:
      ApiError: 400.
    """
    try:
        body.decode()
    except UnicodeDecodeError as error:
        raise ApiError(400, f"The body is not valid JSON: byte {error.start} is not UTF-8.") from None
    if b"\0" in body:  # the parser would decode it as UTF-16 or UTF-32, which the checks below don't see through
        raise ApiError(400, f"The body is not valid JSON: byte {body.index(0)} is NUL.")
    outside = _STRING.sub(b"", body)
    if found := _NOT_A_NUMBER.search(outside):
        raise ApiError(400, f"The body is not valid JSON: {found[0].decode()} is not a number.")
    depth = deepest = 0
    for start in range(0, len(outside), _BLOCK):
        depths = depth + np.cumsum(_STEP[np.frombuffer(outside[start : start + _BLOCK], np.uint8)], dtype=np.int64)
        depth, deepest = int(depths[-1]), max(deepest, int(depths.max()))
    if deepest > MAX_DEPTH:
        raise ApiError(400, f"The body is nested {deepest} levels deep; the limit is {MAX_DEPTH}.")
    if (containers := outside.count(b"{") + outside.count(b"[")) > MAX_CONTAINERS:
        raise ApiError(400, f"The body has {containers} arrays and objects; the limit is {MAX_CONTAINERS}.")
