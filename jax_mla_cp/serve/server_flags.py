"""The server's command-line flags."""

from __future__ import annotations

import argparse

from jax_mla_cp.cli import Parser, choice, path, real_number, whole_number
from jax_mla_cp.launch.flags import add_cache_flags, add_cluster_flags, add_model_flags
from jax_mla_cp.serve.tool_calls import FORMATS

KEY_VARIABLE = "JAX_MLA_CP_API_KEY"
"""Environment variable with API keys, one per line."""


def _seconds(text: str) -> float | None:
    return None if text == "off" else real_number(text)


def _origins(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(","))


_EPILOG = """examples:
  python -m jax_mla_cp.serve                                 the built-in model on one device
  python -m jax_mla_cp.serve --mesh tp=8,cp=4                the built-in model on 32 GPUs or virtual CPU devices
  python -m jax_mla_cp.serve --mesh tp=8,cp=4 --model DIR    a DeepSeek-V3-style checkpoint

several hosts, such as four with 8 GPUs each: the same command on each, with its own K from 0 to 3; clients talk to
process 0 (docs/several-hosts.md):
  python -m jax_mla_cp.serve --mesh tp=8,cp=4 --model DIR --coordinator 10.0.0.1:8476 --num-processes 4 --process-id K
  srun --nodes=4 --ntasks-per-node=1 python -m jax_mla_cp.serve --mesh tp=8,cp=4 --model DIR --distributed

endpoints:
  POST /v1/completions, /v1/chat/completions, /tokenize, /detokenize
  GET  /v1/models, /tokenizer_info, /health, /ready, /version
  GET  / status page with a chat box; /status the same data as JSON; /metrics for Prometheus
  GET  /docs interactive API documentation; /openapi.json

access from other machines, with an API key and TLS:
  (umask 077; openssl rand -hex 32 >keys.txt)
  python -m jax_mla_cp.serve --host 0.0.0.0 --api-key-file keys.txt --ssl-certfile cert.pem --ssl-keyfile key.pem

exit status:
  0 stopped after all requests finished; 1 requests were cut off by the drain timeout or a second signal, or another of
  several processes was lost; 2 invalid setting
"""


def make_parser() -> argparse.ArgumentParser:
    """The parser of `python -m jax_mla_cp.serve`: a namespace of the `ServerOptions` fields that were given."""
    p = Parser(
        prog="python -m jax_mla_cp.serve",
        description="OpenAI-compatible server for MLA models with prefill context parallelism.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,  # the defaults are ServerOptions'
        allow_abbrev=False,
    )
    add_model_flags(p)
    add_cache_flags(p)
    add_cluster_flags(p)
    _add_start_flags(p)
    _add_chat_flags(p)
    _add_http_flags(p)
    _add_limit_flags(p)
    _add_log_flags(p)
    return p


def _add_start_flags(p: argparse.ArgumentParser) -> None:
    start = p.add_argument_group("startup")
    start.add_argument(
        "--warmup",
        action=argparse.BooleanOptionalAction,
        help="compile all programs before serving, with a progress bar; without it, each program is "
        "compiled at its first use, while requests wait (default: on GPUs only)",
    )
    start.add_argument(
        "--seed",
        metavar="N",
        type=whole_number,
        help="seed of requests that do not set one (default: a random seed per request)",
    )


def _add_chat_flags(p: argparse.ArgumentParser) -> None:
    chat = p.add_argument_group("chat formats (see docs/api.md)")
    formats = ("auto", *FORMATS, "none")
    chat.add_argument(
        "--tool-parser",
        metavar="{" + ",".join(formats) + "}",
        type=choice(*formats),
        help="format of the model's tool calls (default: auto, from the chat template)",
    )
    chat.add_argument(
        "--reasoning-parser",
        metavar="{auto,think,none}",
        type=choice("auto", "think", "none"),
        help="format of the model's reasoning; think: between <think> and </think>; none: everything is content "
        "(default: auto, think if the template or the vocabulary has both tags)",
    )


def _add_http_flags(p: argparse.ArgumentParser) -> None:
    http = p.add_argument_group("HTTP and access control (see docs/running-safely.md)")
    http.add_argument(
        "--host",
        metavar="ADDRESS",
        help="address to listen on; 0.0.0.0: all interfaces, which calls for API keys or an authenticating "
        "proxy (default: 127.0.0.1, this machine only)",
    )
    http.add_argument(
        "--port", metavar="N", type=whole_number, help="port to listen on; 0: any free port (default: 8000)"
    )
    http.add_argument(
        "--api-key-file",
        metavar="FILE",
        type=path,
        help="file of accepted API keys, one per line; clients send `Authorization: Bearer KEY`. Keys in "
        f"the environment variable {KEY_VARIABLE} are accepted as well. /health, /ready and /version need no key (default: no keys, access for everyone)",
    )
    http.add_argument(
        "--ssl-certfile", metavar="FILE", type=path, help="certificate chain (PEM); enables HTTPS (default: HTTP)"
    )
    http.add_argument(
        "--ssl-keyfile", metavar="FILE", type=path, help="private key (PEM), if it is not in --ssl-certfile"
    )
    http.add_argument(
        "--ssl-keyfile-password-file",
        metavar="FILE",
        type=path,
        help="file whose first line is the private key's password",
    )
    http.add_argument(
        "--cors-origins",
        metavar="URL,...",
        type=_origins,
        help="origins whose web pages may call the server, separated by commas, or * for all (default: none)",
    )


def _add_limit_flags(p: argparse.ArgumentParser) -> None:
    limits = p.add_argument_group("limits and timeouts (in seconds, or off)")
    limits.add_argument(
        "--max-queued",
        metavar="N",
        type=whole_number,
        help="maximum number of requests in the waiting queue, where each prompt and choice of an HTTP "
        "request counts; further requests get 503 with Retry-After (default: 1024)",
    )
    limits.add_argument(
        "--max-body-mb",
        metavar="N",
        type=whole_number,
        help="maximum size of a request body in MiB; larger ones get 413 (default: 16, enough for a prompt "
        "of a million token ids)",
    )
    limits.add_argument(
        "--queue-timeout",
        metavar="S",
        type=_seconds,
        help="maximum time in the waiting queue; requests that wait longer get 503 (default: off)",
    )
    limits.add_argument(
        "--request-timeout",
        metavar="S",
        type=_seconds,
        help="maximum time from a request's arrival to its end; requests that take longer are aborted with "
        "408 (default: off)",
    )
    limits.add_argument(
        "--watchdog",
        metavar="S",
        type=_seconds,
        help="maximum duration of a step; while a step takes longer, /health returns 503 so that a "
        "supervisor can restart the server. Compilation counts: with --no-warmup a step's first use "
        "may take minutes. With several processes a step that takes longer ends all of them; a program's first "
        "use has ten times as long (default: 600, with several processes 60)",
    )
    limits.add_argument(
        "--no-overlap",
        dest="overlap",
        action="store_false",
        help="read each step's tokens before the next step is dispatched; for comparisons and debugging (default: the "
        "engine runs one step ahead of the host, except with --speculative and with several processes)",
    )
    limits.add_argument(
        "--drain-timeout",
        metavar="S",
        type=real_number,
        help="graceful shutdown after SIGTERM or Ctrl-C: new requests and /ready get 503, and running "
        "requests have this long to finish; a second signal exits at once (default: 30)",
    )


def _add_log_flags(p: argparse.ArgumentParser) -> None:
    logs = p.add_argument_group("logging, to standard error: one line per finished request")
    logs.add_argument(
        "--log-level",
        metavar="{debug,info,warning,error}",
        type=choice("debug", "info", "warning", "error"),
        help="minimum level; debug includes health checks and metrics scrapes (default: info)",
    )
    logs.add_argument(
        "--log-format",
        metavar="{text,json}",
        type=choice("text", "json"),
        help="json: one JSON object per line (default: text)",
    )
    logs.add_argument(
        "--log-requests",
        action="store_true",
        help="log the full content of requests and responses, readable by anyone who can read the log (default: off)",
    )
