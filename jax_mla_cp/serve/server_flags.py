"""The server's command line: the flags in groups, and what each is for."""

from __future__ import annotations

import argparse

from jax_mla_cp.cli import Parser, choice, path, real_number, whole_number
from jax_mla_cp.launch_flags import add_cache_flags, add_model_flags

KEY_VARIABLE = "JAX_MLA_CP_API_KEY"
"""The environment variable that API keys may come in, one a line."""


def _seconds(text: str) -> float | None:
    return None if text == "off" else real_number(text)


def _origins(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(","))


_EPILOG = """examples:
  python -m jax_mla_cp.serve                                 the built-in model on one device
  python -m jax_mla_cp.serve --mesh tp=8,cp=4                on 32: GPUs, or virtual CPU devices made for it
  python -m jax_mla_cp.serve --mesh tp=8,cp=4 --model DIR    a DeepSeek-V3-style checkpoint

endpoints:
  POST /v1/completions, /v1/chat/completions, /tokenize, /detokenize; GET /v1/models, /tokenizer_info, /health, /ready, /version
  GET /docs: all of them, to try out; /openapi.json
  GET / in a browser: what the server does, live, and a chat box; GET /metrics for Prometheus, /status as JSON

with keys, for other machines:
  (umask 077; openssl rand -hex 32 >keys.txt)
  python -m jax_mla_cp.serve --host 0.0.0.0 --api-key-file keys.txt --ssl-certfile cert.pem --ssl-keyfile key.pem

exit code: 0 stopped, every request done; 1 the drain timeout or a second signal cut requests off; 2 a setting that can't work
"""


def make_parser() -> argparse.ArgumentParser:
    """The parser of `python -m jax_mla_cp.serve`: a namespace of the `ServerOptions` fields that were given."""
    p = Parser(
        prog="python -m jax_mla_cp.serve",
        description="Serves an MLA model with prefill context parallelism, for OpenAI clients.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,  # the defaults are ServerOptions'
        allow_abbrev=False,
    )
    add_model_flags(p)
    add_cache_flags(p)
    _add_start_flags(p)
    _add_http_flags(p)
    _add_limit_flags(p)
    _add_log_flags(p)
    return p


def _add_start_flags(p: argparse.ArgumentParser) -> None:
    start = p.add_argument_group("start")
    start.add_argument(
        "--warmup",
        action=argparse.BooleanOptionalAction,
        help="compile every program before serving, behind a progress bar; without, each at its first use, which a "
        "request then waits for (default: on GPUs)",
    )
    start.add_argument(
        "--seed",
        metavar="N",
        type=whole_number,
        help="the seed of requests that carry none (default: a fresh one each)",
    )


def _add_http_flags(p: argparse.ArgumentParser) -> None:
    http = p.add_argument_group("HTTP and who may come in (docs/running-safely.md)")
    http.add_argument(
        "--host",
        metavar="ADDRESS",
        help="where to listen; 0.0.0.0: on all interfaces, which needs keys or a proxy that asks for them "
        "(default: 127.0.0.1, this machine only)",
    )
    http.add_argument("--port", metavar="N", type=whole_number, help="0: any free one (default: 8000)")
    http.add_argument(
        "--api-key-file",
        metavar="FILE",
        type=path,
        help="keys that clients must send as `Authorization: Bearer KEY`, one a line; "
        f"{KEY_VARIABLE} in the environment is another way, and both together count (default: no "
        "keys, everybody may ask). /health, /ready and /version stay open",
    )
    http.add_argument(
        "--ssl-certfile", metavar="FILE", type=path, help="certificate chain (PEM): speak HTTPS (default: HTTP)"
    )
    http.add_argument(
        "--ssl-keyfile", metavar="FILE", type=path, help="its private key (PEM), if it isn't in the same file"
    )
    http.add_argument(
        "--ssl-keyfile-password-file",
        metavar="FILE",
        type=path,
        help="what decrypts the private key: the file's first line",
    )
    http.add_argument(
        "--cors-origins",
        metavar="URL,...",
        type=_origins,
        help="let web pages from these origins call the server, or * for all (default: none)",
    )


def _add_limit_flags(p: argparse.ArgumentParser) -> None:
    limits = p.add_argument_group("limits and times: seconds, or off")
    limits.add_argument(
        "--max-queued",
        metavar="N",
        type=whole_number,
        help="most requests that wait to run, each prompt and choice of an HTTP request counted; further "
        "ones get 503 with Retry-After (default: 1024)",
    )
    limits.add_argument(
        "--max-body-mb",
        metavar="N",
        type=whole_number,
        help="largest body of a request, MiB; larger ones get 413 (default: 16, a prompt of a million token ids)",
    )
    limits.add_argument(
        "--queue-timeout",
        metavar="S",
        type=_seconds,
        help="a request that waited so long to run gets 503 (default: off)",
    )
    limits.add_argument(
        "--request-timeout",
        metavar="S",
        type=_seconds,
        help="a request that isn't done so long after its arrival gets 408 and its pages are freed (default: off)",
    )
    limits.add_argument(
        "--watchdog",
        metavar="S",
        type=_seconds,
        help="a step that takes longer makes /health answer 503, so that whoever watches it can start the "
        "server again. Compiling counts: with --no-warmup a step's first use may take minutes "
        "(default: 600)",
    )
    limits.add_argument(
        "--drain-timeout",
        metavar="S",
        type=real_number,
        help="after SIGTERM or Ctrl-C: /ready and new requests get 503, and what runs has so long to "
        "finish; a second signal leaves at once (default: 30)",
    )


def _add_log_flags(p: argparse.ArgumentParser) -> None:
    logs = p.add_argument_group("logs, on standard error: a line for each request when it is done")
    logs.add_argument(
        "--log-level",
        metavar="{debug,info,warning,error}",
        type=choice("debug", "info", "warning", "error"),
        help="debug has health checks and scrapes too (default: info)",
    )
    logs.add_argument(
        "--log-format",
        metavar="{text,json}",
        type=choice("text", "json"),
        help="json: an object a line (default: text)",
    )
    logs.add_argument(
        "--log-requests",
        action="store_true",
        help="write requests and answers into the log, whole: whoever reads it reads them (default: neither)",
    )
