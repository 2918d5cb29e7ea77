"""Who may come in: API keys, and the files of TLS."""

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

OPEN_PATHS = frozenset({"/", "/health", "/ready", "/version"})
"""What needs no key: what a load balancer asks, and the status page's empty form."""

OPEN_FOLDER = "/page/"
"""The form's scripts and styles, the same files in every installation."""

_SHORTEST_KEY = 16
_MAKE_ONE = "Make one with: openssl rand -hex 32"


class ApiKeys:
    """The keys that are let in, as digests: neither a dump of the object nor a traceback shows one."""

    def __init__(self, keys: Iterable[str]):
        self._digests = [hashlib.sha256(key.encode()).digest() for key in keys]

    def __len__(self) -> int:
        return len(self._digests)

    def allow(self, key: bytes) -> bool:
        """Takes as long whichever key it is, and however much of one is right (CVE-2025-59425)."""
        digest = hashlib.sha256(key).digest()
        found = False
        for known in self._digests:
            found |= hmac.compare_digest(known, digest)
        return found


def read_keys(file: Path | None, environment: Mapping[str, str]) -> ApiKeys | None:
    """The keys of the file and of `JAX_MLA_CP_API_KEY`, one a line; blank lines and lines that start with # are none.

    Returns:
      None if neither is given.

    Raises:
      ConfigError: a file that can't be read, a source without a key, or a key that can't be sent or is easily guessed.
    """
    sources = []
    if file is not None:
        sources.append(("api_key_file", _read(file, "api_key_file")))
        if file.stat().st_mode & (stat.S_IRGRP | stat.S_IROTH):
            log.warning("--api-key-file: other users can read %s. Forbid it: chmod 600", file)
    if KEY_VARIABLE in environment:
        sources.append((KEY_VARIABLE, environment[KEY_VARIABLE]))
    if not sources:
        return None
    keys: set[str] = set()
    for source, text in sources:
        found = [line.strip() for line in text.splitlines() if line.strip() and not line.startswith("#")]
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


class RequireKey:
    """ASGI middleware: without a key, only `OPEN_PATHS`, `OPEN_FOLDER` and preflights answer."""

    def __init__(self, app: ASGIApp, keys: ApiKeys):
        self._app = app
        self._keys = keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = scope.get("path", "")
        is_open = path in OPEN_PATHS or path.startswith(OPEN_FOLDER)
        if scope["type"] != "http" or scope["method"] == "OPTIONS" or is_open:
            await self._app(scope, receive, send)
            return
        given = [value for name, value in scope["headers"] if name == b"authorization"]
        scheme, _, key = given[0].partition(b" ") if len(given) == 1 else (b"", b"", b"")
        if scheme.lower() == b"bearer" and self._keys.allow(key.strip()):
            await self._app(scope, receive, send)
            return
        error = ApiError(
            401,
            "The API key is not one of this server's." if given else "An API key is needed: Authorization: Bearer KEY.",
            code="invalid_api_key",
            headers={"www-authenticate": "Bearer"},
        )
        await error.response()(scope, receive, send)


def tls_settings(certfile: Path | None, keyfile: Path | None, password_file: Path | None) -> dict[str, Any]:
    """uvicorn's `ssl_*` settings, tried out: what is wrong with a certificate is known before a model is loaded.

    Returns:
      Empty without a certificate.

    Raises:
      ConfigError: a file that can't be read, isn't PEM, doesn't fit the other one, or needs a password.
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
    """Says it loudly when other machines can reach the server and nothing is asked of them."""
    if _loopback(host):
        return
    if keys is None:
        log.warning(
            "--host %s without API keys: EVERYONE who can reach this address can use the model and see its status. "
            "Set --api-key-file, or listen on 127.0.0.1.",
            host,
        )
    elif not tls:
        log.warning(
            "--host %s without TLS: keys and prompts cross the network readable. Set --ssl-certfile, or put a proxy with "
            "TLS before it.",
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
        raise ConfigError(field, f"{file} can't be read ({reason}). Give a file of this user's.") from error
