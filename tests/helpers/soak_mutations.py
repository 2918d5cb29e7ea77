"""Valid request bodies, changed so that they are not what a client would send, over raw sockets."""

from __future__ import annotations

import dataclasses
import json
import random
import socket
from collections.abc import Callable
from typing import Any
from urllib.parse import urlsplit

BODIES: list[tuple[str, dict[str, Any]]] = [
    ("/v1/completions", {"prompt": [5, 6, 7], "max_tokens": 2, "temperature": 0, "logprobs": 1}),
    (
        "/v1/completions",
        {
            "prompt": "Context parallelism",
            "max_tokens": 2,
            "stream": True,
            "stop": ["x"],
            "seed": 1,
            "stream_options": {"include_usage": True},
        },
    ),
    (
        "/v1/completions",
        {"prompt": [[5], [6, 7]], "max_tokens": 1, "echo": True, "logprobs": 2, "logit_bias": {"5": -1.5}},
    ),
    (
        "/v1/completions",
        {
            "prompt": "a",
            "max_tokens": 2,
            "response_format": {
                "type": "json_schema",
                "json_schema": {"name": "x", "schema": {"type": "object", "properties": {"a": {"type": "integer"}}}},
            },
        },
    ),
    (
        "/v1/chat/completions",
        {
            "messages": [{"role": "user", "content": "Hello"}],
            "max_tokens": 2,
            "top_logprobs": 2,
            "logprobs": True,
            "presence_penalty": 0.5,
        },
    ),
    ("/tokenize", {"prompt": "Context parallelism", "add_special_tokens": False}),
    ("/detokenize", {"tokens": [5, 6, 7]}),
]
VALUES = [
    "null",
    "true",
    "-1",
    "0",
    "1e999",
    "-1e999",
    "NaN",
    "Infinity",
    "1.5",
    "2147483648",
    "9" * 400,
    "1e-400",
    '""',
    '"\\ud800"',
    '"\\u0000"',
    "[]",
    "{}",
    "[[[[[]]]]]",
    '[""]',
    "[null]",
    '{"a": 1}',
    '"' + "a" * 5000 + '"',
    "[" * 5000 + "]" * 5000,
    '{"a":' * 3000 + "1" + "}" * 3000,
]
"""Literals that take a value's place, most of them no good."""


def _truncated(raw: bytes, rng: random.Random) -> bytes:
    return raw[: rng.randrange(len(raw))]


def _flipped(raw: bytes, rng: random.Random) -> bytes:
    changed = bytearray(raw)
    for _ in range(rng.randint(1, 4)):
        changed[rng.randrange(len(changed))] = rng.randrange(256)
    return bytes(changed)


def _inserted(raw: bytes, rng: random.Random) -> bytes:
    place = rng.randrange(len(raw))
    what = rng.choice(
        [b"\xff\xfe", b"\x00", b"\xed\xa0\x80", b"\xf4\x90\x80\x80", b"{", b"]", b"\\", b'"', b"/*", b"\xef\xbb\xbf"]
    )
    return raw[:place] + what * rng.randint(1, 3) + raw[place:]


def _replaced(raw: bytes, rng: random.Random) -> bytes:
    """One value becomes another one's literal."""
    data = json.loads(raw)
    name, literal = rng.choice(list(data)), rng.choice(VALUES)
    data[name] = "@@"
    return json.dumps(data).replace('"@@"', literal).encode()


def _unknown(raw: bytes, rng: random.Random) -> bytes:
    name = rng.choice(["nonsense", "__class__", "prompt_embeds", "chat_template", "model_", "a" * 3000, "\u202e"])
    return json.dumps(json.loads(raw) | {name: json.loads(rng.choice(["1", "null", "[1]", '{"a": 1}']))}).encode()


def _twice(raw: bytes, rng: random.Random) -> bytes:
    name = rng.choice(list(json.loads(raw)))
    return raw[:-1] + f', "{name}": {rng.choice(VALUES)}}}'.encode()


def _as_it_was(raw: bytes, rng: random.Random) -> bytes:
    return raw


HANG_UP = 1.0
"""Seconds after which a client does."""
MUTATIONS: list[Callable[[bytes, random.Random], bytes]] = [
    _truncated,
    _flipped,
    _inserted,
    _replaced,
    _unknown,
    _twice,
    _as_it_was,
]


@dataclasses.dataclass(frozen=True)
class Mutated:
    """A whole HTTP request."""

    request: bytes
    what: str
    """Description of its making."""
    incomplete: bool
    """It announces more than it has."""
    endless: bool
    """It asks for as many tokens as fit, minutes of them: the client hangs up."""


def mutated(model: str, rng: random.Random) -> Mutated:
    path, fields = rng.choice(BODIES)
    raw = json.dumps(fields if path == "/detokenize" else {"model": model, **fields}).encode()
    mutation = rng.choice(MUTATIONS)
    raw = mutation(raw, rng)
    length = len(raw)
    if rng.random() < 0.1:
        length = rng.choice([0, 1, length // 2, length + 1, length + 1000])
    kind = rng.choice(["application/json"] * 18 + ["text/plain", ""])
    head = f"POST {path} HTTP/1.1\r\nhost: x\r\ncontent-type: {kind}\r\ncontent-length: {length}\r\nconnection: close\r\n\r\n"
    what = f"{path} {mutation.__name__[1:]}, {length} of {len(raw)} bytes announced: {raw[:200]!r}"
    return Mutated(head.encode() + raw, what, length > len(raw), _is_endless(raw))


def _is_endless(raw: bytes) -> bool:
    try:
        fields = json.loads(raw)
    except (ValueError, RecursionError):
        return False
    return isinstance(fields, dict) and fields.get("max_tokens", 0) is None


def send_raw(url: str, mutated: Mutated, seconds: float) -> int | None:
    """The status; None: the server closed the connection without one, or the client hung up.

    Raises:
      TimeoutError: neither came.
    """
    address = urlsplit(url)
    with socket.create_connection((address.hostname, address.port), timeout=seconds) as connection:
        connection.settimeout(HANG_UP if mutated.endless else seconds)
        received = b""
        try:
            connection.sendall(mutated.request)
            if mutated.incomplete:
                connection.shutdown(socket.SHUT_WR)  # the rest will not come
            while b"\r\n" not in received and (more := connection.recv(4096)):
                received += more
        except (ConnectionResetError, BrokenPipeError):
            pass
        except TimeoutError:
            if not mutated.endless:
                raise
    return int(received.split(b" ", 2)[1]) if received else None
