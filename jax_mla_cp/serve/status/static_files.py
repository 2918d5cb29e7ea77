"""The page's files, read once: a request can name one of these and nothing else."""

from __future__ import annotations

import dataclasses
import hashlib
from importlib import resources

from fastapi import Request
from fastapi.responses import Response

_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}  # not the system's table, which may say anything of .js

_HEADERS = {
    # Scripts and styles of this server and no other, none in the page itself; no frame may hold it.
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
    "cache-control": "no-cache",  # kept, but asked for each time: 304 until a new version is installed
}


@dataclasses.dataclass(frozen=True)
class File:
    body: bytes
    content_type: str

    @property
    def etag(self) -> str:
        return f'"{hashlib.sha256(self.body).hexdigest()[:32]}"'

    def response(self, request: Request) -> Response:
        """The file, or 304 for a client that has it."""
        headers = _HEADERS | {"etag": self.etag}
        if self.etag in request.headers.get("if-none-match", ""):
            return Response(status_code=304, headers=headers)
        return Response(self.body, media_type=self.content_type, headers=headers)


def read_files() -> dict[str, File]:
    """Name -> file, of all in page/."""
    found = {}
    for path in resources.files(__package__).joinpath("page").iterdir():
        kind = _TYPES.get("." + path.name.rpartition(".")[2])
        if kind:
            found[path.name] = File(path.read_bytes(), kind)
    return found
