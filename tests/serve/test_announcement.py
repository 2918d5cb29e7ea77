"""The startup announcement: its curl command works as printed, with keys and TLS too."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import trustme

from jax_mla_cp.serve.announcement import announcement
from jax_mla_cp.serve.middleware import MiddlewareStack
from jax_mla_cp.serve.security import read_keys, tls_settings
from tests.helpers.echo_server import running, write

KEYS = "# ours\n  # indented\n   \n  first-key-0123456789\nsecond-key-0123456789\n"


def command(text: str) -> str:
    found = re.search(r"curl .*\Z", text, re.DOTALL)
    assert found, text
    return found[0]


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
@pytest.mark.parametrize("tls", [False, True])
@pytest.mark.parametrize("keys", ["", "file", "environment"])
def test_the_curl_command_works_as_printed(tmp_path: Path, keys: str, tls: bool) -> None:
    file = write(tmp_path / "the keys", KEYS) if keys == "file" else None
    environment = {"JAX_MLA_CP_API_KEY": "another-key-0123456789"} if keys == "environment" else {}
    accepted = read_keys(file, environment)
    settings: dict[str, Any] = {}
    if tls:
        certificate = tmp_path / "cert.pem"
        trustme.CA().issue_cert("models.example.org").private_key_and_cert_chain_pem.write_to_path(certificate)
        settings = tls_settings(certificate, None, None)
    with running(MiddlewareStack(accepted), tls=settings) as server:
        text = announcement(
            host="0.0.0.0",
            port=server.address[1],
            model="tiny",
            seconds=3.4,
            tls=tls,
            needs_key=accepted is not None,
            key_file=file,
        )
        assert "-key-" not in text, "no key in a log"
        done = subprocess.run(
            ["sh", "-c", command(text)],
            capture_output=True,
            text=True,
            timeout=60,
            env={**environment, "PATH": "/usr/bin:/bin"},
        )
    assert json.loads(done.stdout)["choices"][0]["text"] == "a" * 32, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("host", "address", "local"),
    [
        ("127.0.0.1", "http://127.0.0.1:80", "http://127.0.0.1:80"),
        ("0.0.0.0", "http://0.0.0.0:80", "http://127.0.0.1:80"),
        ("::", "http://[::]:80", "http://[::1]:80"),
        ("fe80::1", "http://[fe80::1]:80", "http://[fe80::1]:80"),
        ("example.org", "http://example.org:80", "http://example.org:80"),
    ],
)
def test_addresses(host: str, address: str, local: str) -> None:
    text = announcement(host=host, port=80, model="it's", seconds=61.2, tls=False, needs_key=False, key_file=None)
    assert text.startswith(f"ready in 61 s: {address}/v1 ")
    assert f"curl {local}/v1/completions " in text or f"curl '{local}/v1/completions' " in text
    assert """'{"model": "it'"'"'s", """ in command(text), "quoted for the shell"
