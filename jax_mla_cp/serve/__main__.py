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
from typing import TYPE_CHECKING

from rich.console import Console
from rich.logging import RichHandler
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from jax_mla_cp.config import ConfigError
from jax_mla_cp.serve.options import ServeConfig, parse

if TYPE_CHECKING:
    from jax_mla_cp.runner import Runner

log = logging.getLogger("jax_mla_cp.serve")

_ATTENTION = {"fa3": "FlashAttention-3", "xla": "XLA"}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the server until it is told to stop. Exit code 0; 2 for a setting that can't work."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _leave)
    try:
        config = parse(argv)
        _log_to_stderr(config.log_level)
        with _listen(config) as listener:
            _serve(config, listener)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _leave(number: int, frame: FrameType | None) -> None:
    """While loading nothing is worth saving, and an exception could be lost in JAX's callbacks: leave at once."""
    Console(stderr=True).show_cursor(True)
    print("\nstopped.", file=sys.stderr, flush=True)
    os._exit(0)


def _ignore(number: int, frame: FrameType | None) -> None:
    """uvicorn handles the signals itself while it serves, and raises them again when it is done."""


def _log_to_stderr(level: str) -> None:
    handler = RichHandler(console=Console(stderr=True), show_path=False, rich_tracebacks=False, markup=False)
    logging.basicConfig(level=logging.WARNING, format="%(message)s", datefmt="%H:%M:%S", handlers=[handler])
    logging.getLogger("jax_mla_cp").setLevel(level.upper())


def _listen(config: ServeConfig) -> socket.socket:
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
            f"--host {config.host} --port {config.port}: can't listen there ({error.strerror or error}). Use another --port."
        ) from error
    return listener


def _serve(config: ServeConfig, listener: socket.socket) -> None:
    from jax_mla_cp import platform

    started = time.perf_counter()
    used = platform.setup(config.platform, config.mesh.devices)
    if config.compile_cache != "off":
        auto = config.compile_cache == "auto"
        platform.enable_compile_cache(platform.default_compile_cache() if auto else config.compile_cache)

    import uvicorn

    from jax_mla_cp.engine import Engine
    from jax_mla_cp.load import load
    from jax_mla_cp.mesh import make_mesh
    from jax_mla_cp.runner import create_runner
    from jax_mla_cp.serve.app import create_app
    from jax_mla_cp.serve.served import Served

    log.info("mesh %s on %d %s devices", config.mesh, config.mesh.devices, used)
    model, tokenizer = load(
        config.model,
        mesh=make_mesh(config.mesh),
        dtype=config.dtype,
        weights=config.weights,
        ep_axes=config.ep_axes,
        attention=config.attention,
        mtp=config.speculative == "mtp",
    )
    log.info(
        "loaded %s: %s%s, experts over %s, attention in %s (%.1f s)",
        config.model or "the built-in model (it finds passkeys and continues technical English, no more)",
        model.build.dtype, ", weights in FP8" if model.build.fp8 else "", ",".join(model.build.ep_axes),
        _ATTENTION[model.build.attention], time.perf_counter() - started,
    )  # fmt: skip
    runner = create_runner(
        model,
        page_size=config.page_size,
        kv_pages=config.kv_pages,
        memory_fraction=config.memory_fraction,
        prefill_chunk=config.prefill_chunk,
        max_model_len=config.max_model_len,
        max_running=config.max_running,
        form=config.form,
        draft_tokens=config.draft_tokens or 0,
    )
    log.info(
        "cache: %d pages of %d tokens per dp group; requests of at most %d tokens, %d at a time",
        runner.pages_per_group, runner.page_size, runner.max_model_len, runner.max_running * runner.dp,
    )  # fmt: skip
    log.info(runner.grid)
    if config.warmup:
        _warm_up(runner)
    engine = Engine(runner)
    served = Served(
        config.served_model_name, engine, tokenizer, model.config.vocab_size, runner.max_model_len,
        model.config.eos_token_ids, config.seed,
    )  # fmt: skip
    server = uvicorn.Server(
        uvicorn.Config(
            create_app(served), log_level="warning", lifespan="off", timeout_graceful_shutdown=5, server_header=False
        )
    )
    engine.start()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _ignore)
    try:
        _announce(config, listener, time.perf_counter() - started)
        listener.listen(1024)
        server.run(sockets=[listener])
    finally:
        engine.stop(timeout=60)
        log.info("stopped")


def _warm_up(runner: Runner) -> None:
    columns = (TextColumn("compiling"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        runner.warmup(progress.track)


def _announce(config: ServeConfig, listener: socket.socket, seconds: float) -> None:
    port = listener.getsockname()[1]
    host = f"[{config.host}]" if ":" in config.host else config.host
    name = config.served_model_name
    print(
        f"""\
ready in {seconds:.0f} s: http://{host}:{port}/v1   (model {name!r}; Ctrl-C ends it)
  curl http://{host}:{port}/v1/completions -H 'Content-Type: application/json' \\
    -d '{{"model": "{name}", "prompt": "Context parallelism is", "max_tokens": 32}}'""",
        flush=True,
    )


if __name__ == "__main__":
    sys.exit(main())
