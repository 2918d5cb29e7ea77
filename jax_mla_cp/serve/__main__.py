"""python -m jax_mla_cp.serve: starts the server. See `--help`."""

from __future__ import annotations

import logging
import os
import signal
import socket
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from jax_mla_cp.version import program_imports

with program_imports():
    from rich.console import Console
    from rich.filesize import decimal
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from jax_mla_cp.cli import fail
    from jax_mla_cp.config.errors import ConfigError
    from jax_mla_cp.default_model import DIRECTORY
    from jax_mla_cp.engine import Engine
    from jax_mla_cp.launch import Runner, load_model, make_runner, set_up_devices
    from jax_mla_cp.serve import logs, security
    from jax_mla_cp.serve.announcement import announcement
    from jax_mla_cp.serve.app import create_app
    from jax_mla_cp.serve.lifecycle import Server, uvicorn_config
    from jax_mla_cp.serve.middleware import MiddlewareStack
    from jax_mla_cp.serve.served_model import ServedModel
    from jax_mla_cp.serve.server_flags import make_parser
    from jax_mla_cp.serve.server_options import ServerOptions, parse
    from jax_mla_cp.serve.status import Telemetry, server_info

log = logging.getLogger("jax_mla_cp.serve")

_ATTENTION = {"fa3": "FlashAttention-3", "xla": "XLA"}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the server until it is stopped.

    Returns:
      The exit code: 0; 1 if running requests were cut off.

    Raises:
      SystemExit: with code 2, for a setting that can't work.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _exit_while_loading)
    config = parse(argv)
    try:
        with logs.to_stderr(config.log_level, config.log_format):
            keys = security.read_keys(config.api_key_file, os.environ)
            tls = security.tls_settings(config.ssl_certfile, config.ssl_keyfile, config.ssl_keyfile_password_file)
            security.warn_if_open(config.host, keys, tls=bool(tls))
            middleware = MiddlewareStack(keys, config.cors_origins, config.max_body_mb << 20, config.log_requests)
            with _listen(config) as listener:
                return _serve(config, listener, middleware, tls)
    except ConfigError as error:
        fail(error, make_parser())


def _exit_while_loading(number: int, frame: FrameType | None) -> None:
    """Exits at once: while loading there is nothing to finish, and an exception could get lost in JAX's callbacks."""
    Console(stderr=True).show_cursor(True)
    print("\nstopped.", file=sys.stderr, flush=True)
    os._exit(0)


def _listen(config: ServerOptions) -> socket.socket:
    """Binds the port before anything is loaded, so that an occupied one is reported at once.

    Raises:
      ConfigError: the address is not available.
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


def _serve(config: ServerOptions, listener: socket.socket, middleware: MiddlewareStack, tls: dict[str, Any]) -> int:
    started = time.perf_counter()
    log.info("starting JAX: mesh %s, %d devices", config.mesh, config.mesh.devices)
    used = set_up_devices(config)
    log.info("running on %d %s devices", config.mesh.devices, used)
    directory = config.model or DIRECTORY
    log.info("reading weights: %s from %s", decimal(_bytes_on_disk(directory)), directory)
    model, tokenizer = load_model(config)
    log.info(
        "loaded %s: %s%s, experts sharded over %s, attention kernel %s (%.1f s)",
        config.model or "the built-in model (a small demo: it finds pass keys and continues technical English)",
        model.build.dtype,
        ", weights in FP8" if model.build.fp8 else "",
        ",".join(model.build.ep_axes),
        _ATTENTION[model.build.attention],
        time.perf_counter() - started,
    )
    runner = make_runner(model, config)
    log.info(
        "KV cache: %d pages of %d tokens per dp group; max_model_len %d; up to %d running requests",
        runner.pages_per_group,
        runner.page_size,
        runner.max_model_len,
        runner.max_running * runner.dp,
    )
    log.info(runner.grid)
    if config.warmup or (config.warmup is None and used == "cuda"):
        log.info(
            "warmup: compiling all programs (8 to 16 s each on a GPU; the compile cache makes later starts faster)"
        )
        _warm_up(runner)
    else:
        log.info(
            "no warmup: each program is compiled at its first use, while requests wait (--warmup compiles all now)"
        )
    telemetry = Telemetry(server_info(config.served_model_name, runner, tokenizer))
    engine = Engine(runner, max_queued=config.max_queued, observer=telemetry, watchdog_seconds=config.watchdog)
    served = ServedModel(
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
    app = create_app(served, middleware, telemetry)
    server = Server(uvicorn_config(app, tls), engine, middleware.drain, config.drain_timeout)
    engine.start()
    try:
        listener.listen(1024)
        ready = announcement(
            host=config.host,
            port=listener.getsockname()[1],
            model=config.served_model_name,
            seconds=time.perf_counter() - started,
            tls=bool(tls),
            needs_key=middleware.keys is not None,
            key_file=config.api_key_file,
        )
        print(ready, flush=True)
        server.run(sockets=[listener])
    finally:
        engine.stop(timeout=60)
        log.info("stopped")
    return int(server.cut_off)


def _warm_up(runner: Runner) -> None:
    columns = (TextColumn("compiling"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        runner.warmup(progress.track)


def _bytes_on_disk(directory: Path) -> int:
    return sum(file.stat().st_size for file in directory.rglob("*") if file.is_file())


if __name__ == "__main__":
    sys.exit(main())
