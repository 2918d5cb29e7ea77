"""API keys and TLS."""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import logging
import os
import ssl
import stat
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from starlette.types import ASGIApp, Receive, Scope, Send

from jax_mla_cp.config.errors import ConfigError
from jax_mla_cp.serve.errors import ApiError
from jax_mla_cp.serve.server_flags import KEY_VARIABLE

log = logging.getLogger(__name__)

_OPEN_PATHS = frozenset({"/", "/health", "/ready", "/version"})
_OPEN_FOLDER = "/page/"
"""The status page's scripts and styles, the same in every installation."""

_SHORTEST_KEY = 16
_MAKE_ONE = "Make one with: openssl rand -hex 32"


class ApiKeys:
    """The accepted API keys, kept as SHA-256 digests so that no dump or traceback shows a key."""

    def __init__(self, keys: Iterable[str]):
        self._digests = [hashlib.sha256(key.encode()).digest() for key in keys]

    def __len__(self) -> int:
        return len(self._digests)

    def allow(self, key: bytes) -> bool:
        """True for an accepted key. Takes constant time for any key (CVE-2025-59425)."""
        digest = hashlib.sha256(key).digest()
        found = False
        for known in self._digests:
            found |= hmac.compare_digest(known, digest)
        return found


def read_keys(file: Path | None, environment: Mapping[str, str]) -> ApiKeys | None:
    """Reads the keys from the file and `JAX_MLA_CP_API_KEY`, one per line; ignores blank lines and lines that start with #.

    Returns:
      The keys; None if neither source is given.

    Raises:
      ConfigError: the file can't be read, a source has no key, or a key is too short or not printable ASCII.
    """
    sources = []
    if file is not None:
        sources.append(("api_key_file", _read(file, "api_key_file")))
        if file.stat().st_mode & (stat.S_IRGRP | stat.S_IROTH):
            log.warning("--api-key-file: other users can read %s. Restrict its permissions: chmod 600", file)
    if KEY_VARIABLE in environment:
        sources.append((KEY_VARIABLE, environment[KEY_VARIABLE]))
    if not sources:
        return None
    keys: set[str] = set()
    for source, text in sources:
        found = [key for line in text.splitlines() if (key := line.strip()) and not key.startswith("#")]
        if not found:
            raise ConfigError(source, f"has no key. {_MAKE_ONE}")
        for number, key in enumerate(found, 1):
            if len(key) < _SHORTEST_KEY or not (key.isascii() and key.isprintable()) or " " in key:
                raise ConfigError(
                    source,
                    f"key {number} must be at least {_SHORTEST_KEY} printable ASCII characters without spaces, "
                    f"got {len(key)}. {_MAKE_ONE}",
                )
        keys.update(found)
    return ApiKeys(keys)


def is_open(path: str) -> bool:
    """True for paths that need no key: what load balancers poll, and the status page without its data."""
    return path in _OPEN_PATHS or path.startswith(_OPEN_FOLDER)


class RequireApiKey:
    """ASGI middleware: rejects requests without a valid key, except for open paths (`is_open`) and CORS preflights."""

    def __init__(self, app: ASGIApp, keys: ApiKeys):
        self._app = app
        self._keys = keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = scope.get("path", "")
        if scope["type"] != "http" or scope["method"] == "OPTIONS" or is_open(path):
            await self._app(scope, receive, send)
            return
        given = [value for name, value in scope["headers"] if name == b"authorization"]
        scheme, _, key = given[0].partition(b" ") if len(given) == 1 else (b"", b"", b"")
        if scheme.lower() == b"bearer" and self._keys.allow(key.strip()):
            await self._app(scope, receive, send)
            return
        error = ApiError(
            401,
            "Invalid API key." if given else "Missing API key. Send it as a header: Authorization: Bearer KEY",
            code="invalid_api_key",
            headers={"www-authenticate": "Bearer"},
        )
        await error.response()(scope, receive, send)


def tls_settings(certfile: Path | None, keyfile: Path | None, password_file: Path | None) -> dict[str, Any]:
    """Validates the certificate before the model is loaded, and returns uvicorn's `ssl_*` settings.

    Returns:
      The settings; empty without a certificate.

    Raises:
      ConfigError: a file can't be read or isn't PEM, the key doesn't match the certificate, or the password is missing or
        wrong.
    """
    if certfile is None:
        return {}
    _read(certfile, "ssl_certfile")
    if keyfile is not None:
        _read(keyfile, "ssl_keyfile")
    password = None
    if password_file is not None:
        password = (_read(password_file, "ssl_keyfile_password_file").splitlines() or [""])[0]
    try:
        # An empty password, not none at all, or OpenSSL would ask for one at the terminal.
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(certfile, keyfile, password or "")
    except (ssl.SSLError, ValueError) as error:  # ValueError: a password that is too long
        raise ConfigError(
            "ssl_certfile",
            f"the certificate {certfile} and the private key can't be used together ({error}). Both must be PEM, the key "
            "that of the certificate, in `ssl_keyfile` or the same file, with `ssl_keyfile_password_file` if it is encrypted.",
        ) from error
    return {"ssl_certfile": certfile, "ssl_keyfile": keyfile, "ssl_keyfile_password": password}


def warn_if_open(host: str, keys: ApiKeys | None, *, tls: bool) -> None:
    """Logs a warning if other machines can reach the server without a key or without TLS."""
    if _loopback(host):
        return
    if keys is None:
        log.warning(
            "--host %s without API keys: EVERYONE who can reach this address can use the model and see its status. "
            "Set --api-key-file, or use --host 127.0.0.1.",
            host,
        )
    elif not tls:
        log.warning(
            "--host %s without TLS: keys and prompts cross the network unencrypted. Set --ssl-certfile, or run the server "
            "behind a proxy that terminates TLS.",
            host,
        )


def _loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host.partition("%")[0]).is_loopback
    except ValueError:
        return host == "localhost"


def _read(file: Path, field: str) -> str:
    try:
        return file.read_text()
    except (OSError, UnicodeDecodeError) as error:
        reason = os.strerror(error.errno) if isinstance(error, OSError) and error.errno else "not a text file"
        raise ConfigError(field, f"{file} can't be read ({reason}). Use a file that this user can read.") from error
