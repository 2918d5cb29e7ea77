"""python -m jax_mla_cp.serve: from flags to a server that answers. `--help` tells the flags."""

from __future__ import annotations

import logging
import os
import signal
import socket
import sys
import time
from collections.abc import Sequence
from types import FrameType
from typing import Any

from jax_mla_cp.version import program_imports

with program_imports():
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from jax_mla_cp.cli import fail
    from jax_mla_cp.config.errors import ConfigError
    from jax_mla_cp.engine import Engine
    from jax_mla_cp.launch import Runner, load_model, make_runner, set_up_devices
    from jax_mla_cp.serve import logs, security
    from jax_mla_cp.serve.app import create_app
    from jax_mla_cp.serve.guards import Guards
    from jax_mla_cp.serve.lifecycle import Server, uvicorn_config
    from jax_mla_cp.serve.served import Served
    from jax_mla_cp.serve.server_flags import make_parser
    from jax_mla_cp.serve.server_options import ServerOptions, parse
    from jax_mla_cp.serve.status import Telemetry, describe

log = logging.getLogger("jax_mla_cp.serve")

_ATTENTION = {"fa3": "FlashAttention-3", "xla": "XLA"}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the server until it is told to stop.

    Returns:
      The exit code: 0; 1 if running requests were cut off.

    Raises:
      SystemExit: with code 2, for a setting that can't work.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _leave)
    config = parse(argv)
    try:
        with logs.to_stderr(config.log_level, config.log_format):
            keys = security.read_keys(config.api_key_file, os.environ)
            tls = security.tls_settings(config.ssl_certfile, config.ssl_keyfile, config.ssl_keyfile_password_file)
            security.warn_if_open(config.host, keys, tls=bool(tls))
            guards = Guards(keys, config.cors_origins, config.max_body_mb << 20, config.log_requests)
            with _listen(config) as listener:
                return _serve(config, listener, guards, tls)
    except ConfigError as error:
        fail(error, make_parser())


def _leave(number: int, frame: FrameType | None) -> None:
    """While loading nothing is worth saving, and an exception could be lost in JAX's callbacks: leave at once."""
    Console(stderr=True).show_cursor(True)
    print("\nstopped.", file=sys.stderr, flush=True)
    os._exit(0)


def _listen(config: ServerOptions) -> socket.socket:
    """Takes the port before anything is loaded: an occupied one is known at once.

    Raises:
      ConfigError: the address can't be had.
    """
    try:
        family, kind, proto, _, address = socket.getaddrinfo(
            config.host, config.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, proto)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        raise ConfigError(
            "port",
            f"can't listen there, host={config.host!r} port={config.port} ({error.strerror or error}). Use another one.",
        ) from error
    return listener


def _serve(config: ServerOptions, listener: socket.socket, guards: Guards, tls: dict[str, Any]) -> int:
    started = time.perf_counter()
    used = set_up_devices(config)
    log.info("mesh %s on %d %s devices", config.mesh, config.mesh.devices, used)
    model, tokenizer = load_model(config)
    log.info(
        "loaded %s: %s%s, experts over %s, attention in %s (%.1f s)",
        config.model or "the built-in model (it finds passkeys and continues technical English, no more)",
        model.build.dtype,
        ", weights in FP8" if model.build.fp8 else "",
        ",".join(model.build.ep_axes),
        _ATTENTION[model.build.attention],
        time.perf_counter() - started,
    )
    runner = make_runner(model, config)
    log.info(
        "cache: %d pages of %d tokens per dp group; requests of at most %d tokens, %d at a time",
        runner.pages_per_group,
        runner.page_size,
        runner.max_model_len,
        runner.max_running * runner.dp,
    )
    log.info(runner.grid)
    if config.warmup or (config.warmup is None and used == "cuda"):
        _warm_up(runner)
    telemetry = Telemetry(describe(config.served_model_name, runner, tokenizer))
    engine = Engine(runner, max_queued=config.max_queued, observer=telemetry, watchdog_seconds=config.watchdog)
    served = Served(
        config.served_model_name,
        engine,
        tokenizer,
        model.config.vocab_size,
        runner.max_model_len,
        model.config.eos_token_ids,
        config.seed,
        config.queue_timeout,
        config.request_timeout,
    )
    app = create_app(served, guards, telemetry)
    server = Server(uvicorn_config(app, tls), engine, guards.drain, config.drain_timeout)
    engine.start()
    try:
        listener.listen(1024)
        _announce(config, listener, time.perf_counter() - started, keys=guards.keys is not None)
        server.run(sockets=[listener])
    finally:
        engine.stop(timeout=60)
        log.info("stopped")
    return int(server.cut_off)


def _warm_up(runner: Runner) -> None:
    columns = (TextColumn("compiling"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        runner.warmup(progress.track)


def _announce(config: ServerOptions, listener: socket.socket, seconds: float, *, keys: bool) -> None:
    port = listener.getsockname()[1]
    host = f"[{config.host}]" if ":" in config.host else config.host
    name = config.served_model_name
    root = f"{'https' if config.ssl_certfile else 'http'}://{host}:{port}"
    key = " -H 'Authorization: Bearer KEY'" if keys else ""
    print(
        f"""\
ready in {seconds:.0f} s: {root}/v1   (model {name!r}; Ctrl-C ends it)
  {root}/ shows what it does, live, and has a chat box
  curl {root}/v1/completions{key} -H 'Content-Type: application/json' \\
    -d '{{"model": "{name}", "prompt": "Context parallelism is", "max_tokens": 32}}'""",
        flush=True,
    )


if __name__ == "__main__":
    sys.exit(main())
