"""The server's command line: the flags in groups, and what each is for."""

from __future__ import annotations

import argparse

from jax_mla_cp.cli import Parser, path, real_number, whole_number
from jax_mla_cp.platform import default_compile_cache

KEY_VARIABLE = "JAX_MLA_CP_API_KEY"
"""The environment variable that API keys may come in, one a line."""


def _seconds(text: str) -> float | None:
    return None if text == "off" else real_number(text)


def _origins(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(","))


def _int_or_auto(text: str) -> int | None:
    return None if text == "auto" else whole_number(text)


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
    """The parser of `python -m jax_mla_cp.serve`: a namespace of the `ServeConfig` fields that were given."""
    p = Parser(
        prog="python -m jax_mla_cp.serve",
        description="Serves an MLA model with prefill context parallelism, for OpenAI clients.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,  # the defaults are ServeConfig's
        allow_abbrev=False,
    )
    add_model_flags(p)
    _add_engine_flags(p)
    _add_http_flags(p)
    _add_limit_flags(p)
    _add_log_flags(p)
    return p


def add_model_flags(p: argparse.ArgumentParser) -> None:
    """The flags that say what model runs on what devices and in what steps, fields of `ServeConfig`: other programs have
    them too."""
    model = p.add_argument_group("model")
    model.add_argument(
        "--model",
        metavar="DIR",
        type=path,
        help="Hugging Face model directory (config.json, *.safetensors, tokenizer.json), or what `python -m "
        "jax_mla_cp.checkpoint convert` made of one; default: the small model that comes with the "
        "program",
    )
    model.add_argument(
        "--served-model-name", metavar="NAME", help="what clients send as `model`; default: the directory's name"
    )
    model.add_argument(
        "--dtype",
        metavar="{auto,float32,bfloat16}",
        help="of weights, activations and cache; auto: float32 on CPU, bfloat16 on GPUs",
    )
    model.add_argument(
        "--weights",
        metavar="{auto,bf16,fp8}",
        help="of a quantized checkpoint; bf16: dequantized while loading, to --dtype (so also to float32); fp8: "
        "kept in FP8, half the memory, dequantized by every use; auto: fp8 on GPUs, else bf16",
    )
    devices = p.add_argument_group("devices")
    devices.add_argument(
        "--mesh",
        metavar="AXES",
        help="tp=8,cp=4[,dp=2] in any order; tp divides heads, cp the tokens of a step, dp the requests; an "
        "axis that is missing is 1 (default: one device)",
    )
    devices.add_argument(
        "--platform",
        metavar="{auto,cpu,cuda}",
        help="auto: GPUs if there are any; cpu makes as many virtual devices as the mesh needs",
    )
    devices.add_argument(
        "--ep-axes",
        metavar='{auto,tp,"tp,cp","tp,cp,dp"}',
        help="the axes that divide the experts; auto: the fewest whose weights fit",
    )
    devices.add_argument(
        "--attention",
        metavar="{auto,fa3,xla}",
        help="the kernel; auto: FlashAttention-3 on a Hopper GPU that can run it, else XLA",
    )
    devices.add_argument(
        "--form",
        metavar="{auto,expanded,absorbed}",
        help="of MLA attention: over per-head keys or over latents; auto: by each request's shape",
    )
    steps = p.add_argument_group("steps")
    steps.add_argument(
        "--page-size",
        metavar="N",
        type=whole_number,
        help="tokens of a cache page; FlashAttention-3 needs a multiple of 64 (default: 64)",
    )
    steps.add_argument(
        "--prefill-chunk",
        metavar="N",
        type=whole_number,
        help="most prompt tokens of a dp group in a step; longer prompts take several, with decoding in between "
        "(default: 2048)",
    )
    steps.add_argument(
        "--compile-cache",
        metavar="{auto,off,DIR}",
        help=f"where compiled programs are kept (default: {default_compile_cache()})",
    )


def _add_engine_flags(p: argparse.ArgumentParser) -> None:
    memory = p.add_argument_group("memory and schedule, each per dp group")
    memory.add_argument(
        "--kv-pages", metavar="N", type=_int_or_auto, help="pages of the cache; auto: what --memory-fraction allows"
    )
    memory.add_argument(
        "--memory-fraction",
        metavar="F",
        type=real_number,
        help="share of a device's memory for weights, temporaries and cache (default: 0.9 of a GPU's, half of "
        "the RAM that is free, which virtual CPU devices share)",
    )
    memory.add_argument(
        "--max-model-len",
        metavar="N",
        type=_int_or_auto,
        help="longest prompt and continuation; auto: the smaller of the model's and what the pages hold",
    )
    memory.add_argument("--max-running", metavar="N", type=whole_number, help="most requests at a time (default: 32)")
    speculation = p.add_argument_group("speculative decoding: the same answers, several tokens a step")
    speculation.add_argument(
        "--speculative",
        metavar="{off,mtp}",
        help="mtp: the checkpoint's layer for multi-token prediction guesses the next tokens, and the "
        "model's next step keeps those that it would have said (default: off)",
    )
    speculation.add_argument(
        "--draft-tokens",
        metavar="N",
        type=whole_number,
        help="guesses per request and step, 1 to 4; more than 1 pays if most of them are accepted, "
        "which /health tells (default: 1)",
    )
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
        help="debug has health checks and scrapes too (default: info)",
    )
    logs.add_argument("--log-format", metavar="{text,json}", help="json: an object a line (default: text)")
    logs.add_argument(
        "--log-requests",
        action="store_true",
        help="write requests and answers into the log, whole: whoever reads it reads them (default: neither)",
    )
