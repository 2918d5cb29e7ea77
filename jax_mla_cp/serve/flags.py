"""The server's command-line flags."""

from __future__ import annotations

import argparse

from jax_mla_cp.cli import Parser, path, real_number, whole_number
from jax_mla_cp.platform import default_compile_cache

KEY_VARIABLE = "JAX_MLA_CP_API_KEY"
"""Environment variable with API keys, one per line."""


def _seconds(text: str) -> float | None:
    return None if text == "off" else real_number(text)


def _origins(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(","))


def _int_or_auto(text: str) -> int | None:
    return None if text == "auto" else whole_number(text)


_EPILOG = """examples:
  python -m jax_mla_cp.serve                                 the built-in model on one device
  python -m jax_mla_cp.serve --mesh tp=8,cp=4                the built-in model on 32 GPUs or virtual CPU devices
  python -m jax_mla_cp.serve --mesh tp=8,cp=4 --model DIR    a DeepSeek-V3-style checkpoint

endpoints:
  POST /v1/completions, /v1/chat/completions, /tokenize, /detokenize
  GET  /v1/models, /tokenizer_info, /health, /ready, /version
  GET  / status page with a chat box; /status the same data as JSON; /metrics for Prometheus
  GET  /docs interactive API documentation; /openapi.json

access from other machines, with an API key and TLS:
  (umask 077; openssl rand -hex 32 >keys.txt)
  python -m jax_mla_cp.serve --host 0.0.0.0 --api-key-file keys.txt --ssl-certfile cert.pem --ssl-keyfile key.pem

exit status:
  0 stopped after all requests finished; 1 requests were cut off by the drain timeout or a second signal; 2 invalid setting
"""


def make_parser() -> argparse.ArgumentParser:
    """The parser of `python -m jax_mla_cp.serve`. Its namespace has the `ServeConfig` fields that were given."""
    p = Parser(
        prog="python -m jax_mla_cp.serve",
        description="OpenAI-compatible server for MLA models with prefill context parallelism.",
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
    """Adds the flags of model, devices and steps, which are fields of `ServeConfig`. Other programs share them."""
    model = p.add_argument_group("model")
    model.add_argument(
        "--model",
        metavar="DIR",
        type=path,
        help="model directory in Hugging Face format (config.json, *.safetensors, tokenizer.json), or the "
        "output of `python -m jax_mla_cp.checkpoint convert` (default: the small built-in model)",
    )
    model.add_argument(
        "--served-model-name",
        metavar="NAME",
        help="model name that clients send as `model` (default: the name of the model directory)",
    )
    model.add_argument(
        "--dtype",
        metavar="{auto,float32,bfloat16}",
        help="data type of weights, activations and KV cache; auto: float32 on CPU, bfloat16 on GPUs (default: auto)",
    )
    model.add_argument(
        "--weights",
        metavar="{auto,bf16,fp8}",
        help="storage of a quantized checkpoint's weights; bf16: dequantize to --dtype while loading; fp8: "
        "keep FP8 in device memory, half the size, and dequantize at each use; auto: fp8 on GPUs, "
        "otherwise bf16 (default: auto)",
    )
    devices = p.add_argument_group("devices")
    devices.add_argument(
        "--mesh",
        metavar="AXES",
        help="device mesh, such as tp=8,cp=4,dp=2: tp shards the heads, cp the tokens of a step, dp the "
        "requests; axes that are left out have size 1 (default: one device)",
    )
    devices.add_argument(
        "--platform",
        metavar="{auto,cpu,cuda}",
        help="auto: GPUs if there are any, otherwise CPU; cpu: virtual CPU devices, as many as the mesh "
        "needs (default: auto)",
    )
    devices.add_argument(
        "--ep-axes",
        metavar='{auto,tp,"tp,cp","tp,cp,dp"}',
        help="mesh axes that shard the experts; auto: the fewest axes whose shards fit into memory (default: auto)",
    )
    devices.add_argument(
        "--attention",
        metavar="{auto,fa3,xla}",
        help="attention kernel; auto: FlashAttention-3 on Hopper GPUs, otherwise XLA (default: auto)",
    )
    devices.add_argument(
        "--form",
        metavar="{auto,expanded,absorbed}",
        help="form of MLA attention; expanded: per-head keys and values; absorbed: latents; auto: chosen "
        "per request by its shape (default: auto)",
    )
    steps = p.add_argument_group("steps")
    steps.add_argument(
        "--page-size",
        metavar="N",
        type=whole_number,
        help="tokens per KV cache page; FlashAttention-3 needs a multiple of 64 (default: 64)",
    )
    steps.add_argument(
        "--prefill-chunk",
        metavar="N",
        type=whole_number,
        help="maximum number of prompt tokens per step and dp group; longer prompts are prefilled in "
        "chunks, with decoding in between (default: 2048)",
    )
    steps.add_argument(
        "--compile-cache",
        metavar="{auto,off,DIR}",
        help=f"directory of the persistent compilation cache (default: {default_compile_cache()})",
    )


def _add_engine_flags(p: argparse.ArgumentParser) -> None:
    memory = p.add_argument_group("memory and scheduling, per dp group")
    memory.add_argument(
        "--kv-pages",
        metavar="N",
        type=_int_or_auto,
        help="number of KV cache pages; auto: as many as --memory-fraction allows (default: auto)",
    )
    memory.add_argument(
        "--memory-fraction",
        metavar="F",
        type=real_number,
        help="fraction of device memory for weights, temporaries and KV cache (default: 0.9 on GPUs; on "
        "CPU 0.5 of the free RAM, which the virtual devices share)",
    )
    memory.add_argument(
        "--max-model-len",
        metavar="N",
        type=_int_or_auto,
        help="maximum context length: prompt plus output tokens; auto: the model's, limited by what the KV "
        "cache holds (default: auto)",
    )
    memory.add_argument(
        "--max-running", metavar="N", type=whole_number, help="maximum number of running requests (default: 32)"
    )
    speculation = p.add_argument_group("speculative decoding: several tokens per step, same outputs")
    speculation.add_argument(
        "--speculative",
        metavar="{off,mtp}",
        help="mtp: the checkpoint's multi-token prediction layer drafts the next tokens, and the model "
        "verifies them in its next step (default: off)",
    )
    speculation.add_argument(
        "--draft-tokens",
        metavar="N",
        type=whole_number,
        help="draft tokens per request and step, 1 to 4; more than 1 pays off at high acceptance rates, "
        "which /health reports (default: 1)",
    )
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
        "may take minutes (default: 600)",
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
        help="minimum level; debug includes health checks and metrics scrapes (default: info)",
    )
    logs.add_argument("--log-format", metavar="{text,json}", help="json: one JSON object per line (default: text)")
    logs.add_argument(
        "--log-requests",
        action="store_true",
        help="log the full content of requests and responses, readable by anyone who can read the log (default: off)",
    )
