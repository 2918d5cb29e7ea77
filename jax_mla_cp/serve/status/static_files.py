"""The status page's files, read once at the start: a request can name these and nothing else."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from importlib import resources

from fastapi import Request
from fastapi.responses import Response

_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}  # not the system's table, whose type for .js varies

_HEADERS = {
    # Only this server's scripts and styles, none inline; the page can't be framed.
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
    "cache-control": "no-cache",  # cached, but revalidated each time: 304 until a new version is installed
}


@dataclasses.dataclass(frozen=True)
class StaticFile:
    body: bytes
    content_type: str

    @functools.cached_property
    def etag(self) -> str:
        return f'"{hashlib.sha256(self.body).hexdigest()[:32]}"'

    def response(self, request: Request) -> Response:
        """The file, or 304 if the client has it already."""
        headers = _HEADERS | {"etag": self.etag}
        if self.etag in request.headers.get("if-none-match", ""):
            return Response(status_code=304, headers=headers)
        return Response(self.body, media_type=self.content_type, headers=headers)


def load_static_files() -> dict[str, StaticFile]:
    """Loads the files of page/, by name."""
    found = {}
    for path in resources.files(__package__).joinpath("page").iterdir():
        kind = _TYPES.get("." + path.name.rpartition(".")[2])
        if kind:
            found[path.name] = StaticFile(path.read_bytes(), kind)
    return found
