"""The log: written by a thread of its own, as text or as JSON lines; and one line for each HTTP request at its end."""

from __future__ import annotations

import contextlib
import contextvars
import copy
import dataclasses
import datetime
import json
import logging
import logging.handlers
import queue
import re
import secrets
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any

from rich.console import Console
from rich.logging import RichHandler
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from jax_mla_cp.engine import Event, Failed, Finished, Request, Token
from jax_mla_cp.serve.errors import ApiError

log = logging.getLogger(__name__)

_POLLED = frozenset({"/health", "/ready", "/metrics", "/status"})
"""Asked every few seconds by machines and the status page: their lines are for debugging."""
_HARMLESS = re.compile(rb"[A-Za-z0-9_.\-]{1,64}")
_WAITING = 10_000
"""Lines that may wait for a slow terminal or pipe; further ones are dropped and counted."""


@dataclasses.dataclass
class Entry:
    """What is known of one HTTP request, for its line in the log. Filled in by whoever learns it."""

    id: str
    """The client's X-Request-Id, if it is short and harmless, or one made here."""
    content: bool
    """Whether `request` and `output` are wanted; without, they stay empty."""
    arrived: float = dataclasses.field(default_factory=time.perf_counter)
    prompt_tokens: int = 0
    """Of the choices that have started; so too the next ones."""
    cached_tokens: int = 0
    output_tokens: int = 0
    started: dict[int, float] = dataclasses.field(default_factory=dict)
    """Seconds in the engine's queue, by choice."""
    ttft: float | None = None
    """Seconds from the request's arrival to its first token, of whichever prompt."""
    finish_reasons: set[str] = dataclasses.field(default_factory=set)
    request: bytes = b""
    output: dict[int, str] = dataclasses.field(default_factory=dict)
    """Text by choice."""

    def take(self, index: int, request: Request, event: Event) -> None:
        """An event of the engine for choice `index` and its request, as it reaches the client."""
        if index not in self.started and request.start_time is not None:
            self.started[index] = request.start_time - request.arrival_time
            self.prompt_tokens += len(request.prompt)
        if isinstance(event, Token):
            self.output_tokens += 1
            if self.ttft is None:
                self.ttft = time.perf_counter() - self.arrived
        elif isinstance(event, Finished):
            self.cached_tokens += event.cached_tokens
            self.finish_reasons.add(event.reason)
        elif isinstance(event, Failed):
            self.finish_reasons.add(event.kind)
        if self.content and isinstance(event, Token | Finished):
            self.output[index] = self.output.get(index, "") + event.text

    def fields(self) -> dict[str, Any]:
        """What is known, by the names that the log has for it."""
        found: dict[str, Any] = {}
        if self.started:
            found = {
                "prompt_tokens": self.prompt_tokens,
                "cached_tokens": self.cached_tokens,
                "output_tokens": self.output_tokens,
                "queue_s": round(max(self.started.values()), 4),
            }
        if self.ttft is not None:
            found["ttft_s"] = round(self.ttft, 4)
        found["total_s"] = round(time.perf_counter() - self.arrived, 4)
        if self.finish_reasons or self.started:
            found["finish"] = ",".join(sorted(self.finish_reasons)) or "abort"  # the client went away
        if self.content:
            found["request"] = self.request.decode(errors="replace")
            found["output"] = [self.output[i] for i in sorted(self.output)]
        return found


_current: contextvars.ContextVar[Entry] = contextvars.ContextVar("entry")


def current() -> Entry:
    """The entry of the HTTP request that this task answers; one that nobody writes, outside of any."""
    return _current.get(None) or Entry(id="", content=False)


class RequestLog:
    """ASGI middleware, the outermost one: gives the request an id, answers what nobody caught, and writes the line."""

    def __init__(self, app: ASGIApp, *, content: bool = False):
        self._app = app
        self._content = content

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        entry = Entry(_request_id(scope["headers"]), self._content)
        token = _current.set(entry)
        status: int | None = None

        async def with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message = {**message, "headers": [*message["headers"], (b"x-request-id", entry.id.encode())]}
            await send(message)

        try:
            await self._app(scope, receive, with_id)
        except Exception:
            log.exception("request %s failed", entry.id)
            if status is None:  # else uvicorn closes the connection: a part of an answer must not look whole
                await ApiError(500, "Internal error; the server's log has it.").response()(scope, receive, with_id)
        finally:
            _current.reset(token)
            self._write(scope, status, entry)

    def _write(self, scope: Scope, status: int | None, entry: Entry) -> None:
        # The path is the client's: escaped, it can't begin a line or move a terminal's cursor.
        request = {"id": entry.id, "method": ascii(scope["method"])[1:-1], "path": ascii(scope["path"])[1:-1][:200]}
        fields = {**request, "status": 499 if status is None else status, **entry.fields()}
        level = logging.DEBUG if scope["path"] in _POLLED else logging.INFO
        log.log(level, "request", extra={"fields": fields})


def _request_id(headers: Sequence[tuple[bytes, bytes]]) -> str:
    for name, value in headers:
        if name == b"x-request-id" and _HARMLESS.fullmatch(value):
            return value.decode()
    return secrets.token_hex(12)


class _Queue(logging.handlers.QueueHandler):
    """Never blocks and never grows without bound: what doesn't fit is dropped and counted."""

    queue: queue.Queue[Any]
    dropped = 0

    def prepare(self, record: logging.LogRecord) -> logging.LogRecord:
        """Arguments may change until the other thread looks at them; a traceback and the fields don't."""
        record = copy.copy(record)
        record.msg, record.args = record.getMessage(), None
        return record

    def enqueue(self, record: logging.LogRecord) -> None:
        if self.dropped and not self.queue.full():
            record.msg = f"{record.msg} ({self.dropped} lines of the log were lost before this one)"
            self.dropped = 0
        try:
            self.queue.put_nowait(record)
        except queue.Full:
            self.dropped += 1


class _Text(logging.Formatter):
    """`message name=value ...`; what a client sent stays on its line."""

    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        fields = getattr(record, "fields", None)
        if fields is None:
            return text
        return " ".join([text, *(f"{name}={_plain(value)}" for name, value in fields.items())])


def _plain(value: object) -> str:
    """Words and numbers as they are, everything else as JSON."""
    text = str(value)
    return text if re.fullmatch(r"[\w./,:%\\-]+", text, re.ASCII) else json.dumps(value)


class _Json(logging.Formatter):
    """An object a line."""

    def format(self, record: logging.LogRecord) -> str:
        at = datetime.datetime.fromtimestamp(record.created, datetime.UTC)
        line = {
            "time": at.isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line)


@contextlib.contextmanager
def to_stderr(level: str, form: str) -> Iterator[None]:
    """Sends the log to standard error by way of a thread, so that a slow reader of it holds up nobody.

    Args:
      level: of this package's lines, the lowest; of others', warnings and errors are shown.
      form: "text" (with colors at a terminal) or "json".
    """
    handler: logging.Handler
    if form == "json":
        handler = logging.StreamHandler()
        handler.setFormatter(_Json())
    elif sys.stderr.isatty():
        handler = RichHandler(console=Console(stderr=True), show_path=False, rich_tracebacks=False, markup=False)
        handler.setFormatter(_Text(datefmt="%H:%M:%S"))
    else:
        handler = logging.StreamHandler()
        handler.setFormatter(_Text("%(asctime)s %(levelname)s %(message)s"))
    front = _Queue(queue.Queue(_WAITING))
    root = logging.getLogger()
    root.addHandler(front)
    root.setLevel(logging.WARNING)
    logging.getLogger("jax_mla_cp").setLevel(level.upper())
    listener = logging.handlers.QueueListener(front.queue, handler)
    listener.start()
    try:
        yield
    finally:
        listener.stop()
        root.removeHandler(front)
