"""Who gets in, what is never run, and TLS. Each test names the attack that it stands against."""

from __future__ import annotations

import ast
import functools
import hmac
import logging
import ssl
from collections.abc import Iterator
from pathlib import Path

import httpx
import openai
import pytest
import trustme

import jax_mla_cp
from jax_mla_cp.config.errors import ConfigError
from jax_mla_cp.serve.middleware import MiddlewareStack
from jax_mla_cp.serve.security import ApiKeys, read_keys, tls_settings, warn_if_open
from tests.helpers.echo_server import BODY, Running, running, write

KEYS = ["first-key-0123456789", "second-key-0123456789", "third-key-0123456789"]


@pytest.fixture(scope="module")
def guarded() -> Iterator[Running]:
    with running(MiddlewareStack(ApiKeys(KEYS), cors_origins=("https://chat.example.org",))) as server:
        yield server


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


def test_every_route_but_the_open_ones_needs_a_key(guarded: Running) -> None:
    """CVE-2025-59425 and servers that guard only /v1: a route that is added later is guarded too."""
    names = {"{name:path}": "tiny", "{name}": "main.js"}
    routes = set()
    for route in guarded.app.routes:
        path = functools.reduce(lambda path, name: path.replace(name, names[name]), names, route.path)
        routes |= {(method, path) for method in route.methods}
    routes |= {("GET", "/nothing"), ("GET", "//v1/models"), ("GET", "/health/../v1/models"), ("GET", "/pages")}
    assert {("POST", "/v1/completions"), ("GET", "/openapi.json"), ("GET", "/docs"), ("GET", "/metrics")} < routes
    with httpx.Client(base_url=guarded.url) as client:
        for method, path in sorted(routes):
            answer = client.request(method, path, json=BODY if method == "POST" else None)
            if path in ("/", "/health", "/ready", "/version", "/page/main.js"):
                assert answer.status_code == 200, path
                continue
            assert answer.status_code == 401, path
            assert answer.headers["www-authenticate"] == "Bearer"
            if method != "HEAD":
                assert answer.json()["error"]["code"] == "invalid_api_key"


@pytest.mark.parametrize(
    "path", ["/page/../v1/models", "/page/..%2fv1/models", "/page//v1/models", "/page/%2e%2e/status"]
)
def test_an_open_folder_is_no_way_round(guarded: Running, path: str) -> None:
    """As it is written, which httpx would not send."""
    answer = guarded.raw(f"GET {path} HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n".encode())
    assert answer.startswith((b"HTTP/1.1 401", b"HTTP/1.1 404")) and b"max_model_len" not in answer


def test_each_key_is_let_in_and_no_other(guarded: Running) -> None:
    for key in KEYS:
        client = openai.OpenAI(base_url=f"{guarded.url}/v1", api_key=key, max_retries=0)
        assert client.completions.create(model="tiny", prompt="Hi", max_tokens=2).choices[0].text == "aa"
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=f"{guarded.url}/v1", api_key="x" * 20, max_retries=0).models.list()
    for value in (
        "",
        "Bearer",
        f"Basic {KEYS[0]}",
        KEYS[0],
        f"Bearer {KEYS[0]}x",
        f"Bearer {KEYS[0][:-1]}",
        f"Bearer {KEYS[0]},{KEYS[1]}",
        "Bearer \xff\xfe",
    ):
        headers = {"authorization": value.encode("latin-1")}
        assert httpx.get(f"{guarded.url}/v1/models", headers=headers).status_code == 401, value
    twice = [("authorization", f"Bearer {KEYS[0]}"), ("authorization", "Bearer no")]
    assert httpx.get(f"{guarded.url}/v1/models", headers=twice).status_code == 401
    assert httpx.get(f"{guarded.url}/v1/models", headers={"authorization": f"bearer {KEYS[1]}"}).status_code == 200


def test_a_key_takes_as_long_whichever_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """CVE-2025-59425: digests of one length, all of them compared, none early."""
    compared: list[int] = []
    compare = hmac.compare_digest

    def counting(a: bytes, b: bytes) -> bool:
        compared.append(len(a) + len(b))
        return compare(a, b)

    monkeypatch.setattr(hmac, "compare_digest", counting)
    keys = ApiKeys(KEYS)
    for key in (*KEYS, "", "x", "x" * 10_000):
        compared.clear()
        assert keys.allow(key.encode()) == (key in KEYS)
        assert compared == [64, 64, 64]
    assert not any(key in repr(vars(keys)) for key in KEYS)


def test_a_preflight_needs_no_key_and_only_known_origins_pass(guarded: Running) -> None:
    def preflight(url: str, origin: str) -> httpx.Response:
        headers = {
            "origin": origin,
            "access-control-request-method": "POST",
            "access-control-request-headers": "authorization,content-type",
        }
        return httpx.options(f"{url}/v1/completions", headers=headers)

    allowed = preflight(guarded.url, "https://chat.example.org")
    assert allowed.status_code == 200
    assert allowed.headers["access-control-allow-origin"] == "https://chat.example.org"
    assert "access-control-allow-origin" not in preflight(guarded.url, "https://evil.example").headers
    refused = httpx.get(f"{guarded.url}/v1/models", headers={"origin": "https://chat.example.org"})
    assert refused.status_code == 401 and "access-control-allow-origin" in refused.headers
    with running() as server:  # off by default
        answer = preflight(server.url, "https://chat.example.org")
        assert answer.status_code == 405 and not [n for n in answer.headers if n.startswith("access-control")]


def test_keys_from_file_and_environment(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = write(tmp_path / "keys", f"# ours\n  # indented\n{KEYS[0]}\n\n  {KEYS[1]}\r\n")
    keys = read_keys(file, {"JAX_MLA_CP_API_KEY": f"{KEYS[2]}\n{KEYS[0]}"})
    assert keys is not None and len(keys) == 3
    assert all(keys.allow(key.encode()) for key in KEYS) and not keys.allow(b"# ours")
    assert read_keys(None, {}) is None
    assert not caplog.records
    file.chmod(0o644)
    read_keys(file, {})
    assert "chmod 600" in caplog.text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "has no key"),
        ("# only this\n", "has no key"),
        ("short\n", "key 1 must be at least 16"),
        (f"{KEYS[0]}\nwith a space in the key\n", "key 2 must be"),
        ("schlüssel-0123456789\n", "printable ASCII"),
    ],
)
def test_keys_that_cant_be(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as refused:
        read_keys(write(tmp_path / "keys", text), {})
    assert not [line for line in text.split() if len(line) > 10 and line in str(refused.value)], "no key in a message"
    with pytest.raises(ConfigError, match=f"JAX_MLA_CP_API_KEY: .*{message}"):
        read_keys(None, {"JAX_MLA_CP_API_KEY": text})


def test_a_key_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"api_key_file: .*No such file"):
        read_keys(tmp_path / "none", {})


@pytest.mark.parametrize(
    ("host", "keys", "tls", "warning"),
    [
        ("127.0.0.1", False, False, ""),
        ("::1", False, False, ""),
        ("localhost", False, False, ""),
        ("0.0.0.0", False, False, "EVERYONE"),
        ("::", False, True, "EVERYONE"),
        ("10.0.0.5", False, False, "EVERYONE"),
        ("example.org", False, False, "EVERYONE"),
        ("0.0.0.0", True, False, "without TLS"),
        ("0.0.0.0", True, True, ""),
    ],
)
def test_a_server_that_others_reach_says_so(
    host: str, keys: bool, tls: bool, warning: str, caplog: pytest.LogCaptureFixture
) -> None:
    """CVE-2026-7301, CVE-2025-32444: sockets on all interfaces that nobody meant to open."""
    with caplog.at_level(logging.WARNING):
        warn_if_open(host, ApiKeys(KEYS) if keys else None, tls=tls)
    assert warning in caplog.text and bool(warning) == bool(caplog.records)


def certificate(tmp_path: Path) -> tuple[Path, Path, trustme.CA]:
    ca = trustme.CA()
    made = ca.issue_cert("127.0.0.1")
    chain, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    chain.write_bytes(b"".join(pem.bytes() for pem in made.cert_chain_pems))
    key.write_bytes(made.private_key_pem.bytes())
    return chain, key, ca


def test_tls(tmp_path: Path) -> None:
    chain, key, ca = certificate(tmp_path)
    authority = tmp_path / "ca.pem"
    ca.cert_pem.write_to_path(authority)
    with running(tls=tls_settings(chain, key, None)) as server:
        trusting = ssl.create_default_context(cafile=authority)
        assert httpx.get(f"{server.url}/health", verify=trusting).json() == {"status": "ok"}
        with pytest.raises(httpx.ConnectError, match="certificate"):
            httpx.get(f"{server.url}/health")
        with pytest.raises(httpx.HTTPError):
            httpx.get(f"{server.url.replace('https', 'http')}/health")


def test_certificates_that_cant_be_used(tmp_path: Path) -> None:
    from cryptography.hazmat.primitives import serialization as s

    chain, key, _ = certificate(tmp_path)
    both = tmp_path / "both.pem"
    both.write_bytes(chain.read_bytes() + key.read_bytes())
    assert tls_settings(None, None, None) == {}
    assert tls_settings(both, None, None)["ssl_certfile"] == both
    (tmp_path / "other").mkdir()
    _, others, _ = certificate(tmp_path / "other")
    locked = tmp_path / "locked.pem"
    private = s.load_pem_private_key(key.read_bytes(), None)
    locked.write_bytes(private.private_bytes(s.Encoding.PEM, s.PrivateFormat.PKCS8, s.BestAvailableEncryption(b"open")))
    right, wrong = write(tmp_path / "right", "open\n"), write(tmp_path / "wrong", "no\n")
    assert tls_settings(chain, locked, right)["ssl_keyfile_password"] == "open"
    for cert, private_key, password, message in (
        (tmp_path / "none", key, None, "ssl_certfile: .*No such file"),
        (chain, tmp_path / "none", None, "ssl_keyfile: .*No such file"),
        (chain, locked, tmp_path / "none", "ssl_keyfile_password_file: .*No such file"),
        (chain, None, None, "can't be used together"),
        (chain, others, None, "can't be used together"),
        (chain, locked, None, "can't be used together"),
        (chain, locked, wrong, "can't be used together"),
        (right, key, None, "can't be used together"),
    ):
        with pytest.raises(ConfigError, match=message):
            tls_settings(cert, private_key, password)


def test_no_code_comes_in() -> None:
    """CVE-2025-32444, CVE-2026-7304, CVE-2026-3989, CVE-2025-62164, CVE-2025-66448: nothing in the package unpickles,
    evaluates text, or lets a checkpoint bring its own code."""
    modules = {
        "pickle",
        "cPickle",
        "dill",
        "cloudpickle",
        "marshal",
        "shelve",
        "joblib",
        "torch",
        "zmq",
        "transformers",
    }
    calls = {"eval", "exec", "compile", "__import__"}
    root = Path(jax_mla_cp.__file__).parent
    found = []
    files = sorted(root.rglob("*.py"))
    assert root / "serve" / "app.py" in files
    for file in files:
        for node in ast.walk(ast.parse(file.read_text())):
            names: list[str] = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
            elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                names = [node.func.id] if node.func.id in calls else []
            elif isinstance(node, ast.keyword) and node.arg in ("allow_pickle", "trust_remote_code"):
                names = [node.arg]
            bad = [n for n in names if n.split(".")[0] in modules | calls | {"allow_pickle", "trust_remote_code"}]
            found += [f"{file.relative_to(root)}:{node.lineno} {name}" for name in bad]
    assert found == []


@pytest.mark.parametrize(
    "field",
    [
        {"chat_template": "{{ 1 }}"},
        {"prompt_embeds": "AAAA"},
        {"logits_processors": ["os.system"]},
        {"custom_logit_processor": "80049500"},
        {"structural_tag": "{}"},
    ],
    ids=lambda field: next(iter(field)),
)
def test_clients_bring_no_templates_tensors_or_code(field: dict[str, object]) -> None:
    """CVE-2025-61620, CVE-2026-5760, CVE-2025-62164, CVE-2026-7304: on every route that takes a body."""
    bodies = {
        "/v1/completions": BODY,
        "/v1/chat/completions": {"model": "tiny", "messages": [{"role": "user", "content": "a"}]},
        "/tokenize": {"prompt": "a"},
        "/detokenize": {"tokens": [1]},
    }
    with running() as server:
        paths = server.app.openapi()["paths"]
        assert set(bodies) == {path for path, operations in paths.items() if "post" in operations}
        for path in sorted(bodies):
            answer = httpx.post(server.url + path, json={**bodies[path], **field})
            assert answer.status_code == 400, (path, answer.text)
            assert next(iter(field)) in answer.json()["error"]["message"]
        assert not server.engine.requests
