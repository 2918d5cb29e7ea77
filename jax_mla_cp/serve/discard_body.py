"""Reads what is left of a request's body before an early answer, so that plain clients see the answer."""

from __future__ import annotations

import asyncio

from starlette.types import ASGIApp, Message, Receive, Scope, Send

DISCARD_SECONDS = 30.0
"""Maximum time to read on for."""
IDLE_SECONDS = 2.0
"""Maximum time without more of the body: the client is waiting for the answer."""


class DiscardBody:
    """ASGI middleware: an answer that begins before the body has been read waits for the rest of it, which is dropped.

    Clients like Python's urllib send the whole body before they read. A connection that is closed meanwhile is a broken pipe to
    them, and the answer is lost. The limits are nginx's idea (`lingering_close`).
    """

    def __init__(self, app: ASGIApp, seconds: float = DISCARD_SECONDS, idle_seconds: float = IDLE_SECONDS):
        self._app = app
        self._seconds = seconds
        self._idle_seconds = idle_seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        unread = True

        async def watched_receive() -> Message:
            nonlocal unread
            message = await receive()
            unread = message["type"] == "http.request" and message.get("more_body", False)
            return message

        async def send_after_body(message: Message) -> None:
            nonlocal unread
            # A client that expects 100-continue has not sent its body, and reading would ask for it.
            if unread and message["type"] == "http.response.start" and not _expects_continue(scope):
                await self._discard(watched_receive)
            unread = False
            await send(message)

        await self._app(scope, watched_receive, send_after_body)

    async def _discard(self, receive: Receive) -> None:
        more = True
        try:
            async with asyncio.timeout(self._seconds):
                while more:
                    message = await asyncio.wait_for(receive(), self._idle_seconds)
                    more = message["type"] == "http.request" and message.get("more_body", False)
        except TimeoutError:
            return


def _expects_continue(scope: Scope) -> bool:
    return any(name == b"expect" for name, _ in scope["headers"])
