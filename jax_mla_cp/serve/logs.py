"""Logging on a thread of its own, as text or JSON lines; one line per HTTP request, written when it ends."""

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
"""Paths that monitoring and the status page poll: logged at debug level."""
_VALID_ID = re.compile(rb"[A-Za-z0-9_.\-]{1,64}")
_MAX_QUEUED = 10_000
"""Maximum number of queued lines; further lines are dropped and counted."""
_FLUSH_SECONDS = 1.0


@dataclasses.dataclass
class RequestLogEntry:
    """The data of one HTTP request's log line, collected while it runs."""

    id: str
    """The client's X-Request-Id if it is valid, otherwise a random one."""
    content: bool
    """Collect `request` and `output`."""
    arrived: float = dataclasses.field(default_factory=time.perf_counter)
    prompt_tokens: int = 0
    """Summed over the choices that have started, like the next two."""
    cached_tokens: int = 0
    output_tokens: int = 0
    queue_seconds: dict[int, float] = dataclasses.field(default_factory=dict)
    """Seconds in the waiting queue, by choice."""
    ttft: float | None = None
    """Seconds from arrival to the first token of any choice."""
    finish_reasons: set[str] = dataclasses.field(default_factory=set)
    request: bytes = b""
    output: dict[int, str] = dataclasses.field(default_factory=dict)
    """Generated text by choice."""

    def record(self, index: int, request: Request, event: Event) -> None:
        """Records an engine event of choice `index`, as it reaches the client."""
        if index not in self.queue_seconds and request.start_time is not None:
            self.queue_seconds[index] = request.start_time - request.submit_time
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
        """The fields of the log line that are known."""
        found: dict[str, Any] = {}
        if self.queue_seconds:
            found = {
                "prompt_tokens": self.prompt_tokens,
                "cached_tokens": self.cached_tokens,
                "output_tokens": self.output_tokens,
                "queue_s": round(max(self.queue_seconds.values()), 4),
            }
        if self.ttft is not None:
            found["ttft_s"] = round(self.ttft, 4)
        found["total_s"] = round(time.perf_counter() - self.arrived, 4)
        if self.finish_reasons or self.queue_seconds:
            found["finish"] = ",".join(sorted(self.finish_reasons)) or "abort"  # the client disconnected
        if self.content:
            found["request"] = self.request.decode(errors="replace")
            found["output"] = [self.output[i] for i in sorted(self.output)]
        return found


_current: contextvars.ContextVar[RequestLogEntry] = contextvars.ContextVar("entry")


def current() -> RequestLogEntry:
    """The entry of this task's HTTP request; outside of a request, one that is never written."""
    return _current.get(None) or RequestLogEntry(id="", content=False)


class RequestLog:
    """The outermost ASGI middleware: assigns the request id, answers 500 to uncaught exceptions, and writes the log line."""

    def __init__(self, app: ASGIApp, *, content: bool = False):
        self._app = app
        self._content = content

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        entry = RequestLogEntry(_request_id(scope["headers"]), self._content)
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
            if (
                status is None
            ):  # otherwise uvicorn closes the connection, so that a partial response doesn't look complete
                message = "Internal server error. The server's log has the details under this response's X-Request-Id."
                await ApiError(500, message).response()(scope, receive, with_id)
        finally:
            _current.reset(token)
            self._write(scope, status, entry)

    def _write(self, scope: Scope, status: int | None, entry: RequestLogEntry) -> None:
        # Escaped, so that a client's path can't start a new log line or send terminal control sequences.
        request = {"id": entry.id, "method": ascii(scope["method"])[1:-1], "path": ascii(scope["path"])[1:-1][:200]}
        fields = {**request, "status": 499 if status is None else status, **entry.fields()}
        level = logging.DEBUG if scope["path"] in _POLLED else logging.INFO
        log.log(level, "request", extra={"fields": fields})


def _request_id(headers: Sequence[tuple[bytes, bytes]]) -> str:
    for name, value in headers:
        if name == b"x-request-id" and _VALID_ID.fullmatch(value):
            return value.decode()
    return secrets.token_hex(12)


class _Queue(logging.handlers.QueueHandler):
    """A bounded queue that never blocks: lines that don't fit are dropped and counted."""

    queue: queue.Queue[Any]
    dropped = 0

    def prepare(self, record: logging.LogRecord) -> logging.LogRecord:
        """Formats the message now, since its arguments may change before the other thread reads them."""
        record = copy.copy(record)
        record.msg, record.args = record.getMessage(), None
        return record

    def enqueue(self, record: logging.LogRecord) -> None:
        if self.dropped and not self.queue.full():
            record.msg = f"{record.msg} ({self.dropped} log lines before this one were dropped)"
            self.dropped = 0
        try:
            self.queue.put_nowait(record)
        except queue.Full:
            self.dropped += 1

    def flush(self) -> None:
        """Waits until the other thread has written what is queued, for a moment at most."""
        until = time.monotonic() + _FLUSH_SECONDS
        while self.queue.unfinished_tasks and time.monotonic() < until:
            time.sleep(0.01)


class _Text(logging.Formatter):
    """Formats records as `message name=value ...`, on one line whatever a client sent."""

    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        fields = getattr(record, "fields", None)
        if fields is None:
            return text
        return " ".join([text, *(f"{name}={_plain(value)}" for name, value in fields.items())])


def _plain(value: object) -> str:
    """Words and numbers unchanged, everything else as JSON."""
    text = str(value)
    return text if re.fullmatch(r"[\w./,:%\\-]+", text, re.ASCII) else json.dumps(value)


class _Json(logging.Formatter):
    """Formats records as one JSON object per line."""

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
def to_stderr(level: str, log_format: str) -> Iterator[None]:
    """Logs to standard error from a thread, so that a slow reader blocks no request.

    Args:
      level: minimum level for this package; other packages log warnings and errors.
      log_format: "text" (colored on a terminal) or "json".
    """
    handler: logging.Handler
    if log_format == "json":
        handler = logging.StreamHandler()
        handler.setFormatter(_Json())
    elif sys.stderr.isatty():
        handler = RichHandler(console=Console(stderr=True), show_path=False, rich_tracebacks=False, markup=False)
        handler.setFormatter(_Text(datefmt="%H:%M:%S"))
    else:
        handler = logging.StreamHandler()
        handler.setFormatter(_Text("%(asctime)s %(levelname)s %(message)s"))
    front = _Queue(queue.Queue(_MAX_QUEUED))
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
