"""The startup announcement: the server's address, and a curl command that works as printed."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

from jax_mla_cp.serve.server_flags import KEY_VARIABLE

_WILDCARDS = {"0.0.0.0": "127.0.0.1", "::": "::1"}


def announcement(
    *, host: str, port: int, model: str, seconds: float, tls: bool, needs_key: bool, key_file: Path | None
) -> str:
    """The text printed on standard output once the server is ready.

    Args:
      host: the address that the server listens on.
      seconds: that starting the devices and loading the model took.
      needs_key: clients must send an API key.
      key_file: where the keys are; None: in the environment.
    """
    scheme = "https" if tls else "http"
    address = f"{scheme}://{_bracketed(host)}:{port}"
    local = f"{scheme}://{_bracketed(_WILDCARDS.get(host, host))}:{port}"
    # A certificate names the server's public host, or is signed by a private CA: -k lets this first request through.
    curl = ["curl", *(["-k"] if tls else []), f"{local}/v1/completions"]
    if needs_key:
        curl += ["-H", f'"Authorization: Bearer {_shell_key(key_file)}"']
    body = json.dumps({"model": model, "prompt": "Context parallelism is", "max_tokens": 32})
    return f"""\
ready in {seconds:.0f} s: {address}/v1   (model {model!r}; stop with Ctrl-C)
status page and chat: {local}/
try it:
  {" ".join(curl)} -H 'Content-Type: application/json' \\
    -d {shlex.quote(body)}"""


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def _shell_key(key_file: Path | None) -> str:
    """A shell expression for the first key, inside double quotes: the key itself is never printed."""
    if key_file is None:
        return f"${KEY_VARIABLE}"
    return f"$(grep -m1 '^[[:space:]]*[^#[:space:]]' {shlex.quote(str(key_file))} | tr -d '[:space:]')"
