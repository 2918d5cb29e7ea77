"""python -m jax_mla_cp.serve: starts the server. See `--help`."""

from __future__ import annotations

import logging
import os
import socket
import sys
import time
from collections.abc import Sequence
from typing import Any

from jax_mla_cp.version import program_imports

with program_imports():
    from rich.console import Console

    from jax_mla_cp.config.errors import ConfigError
    from jax_mla_cp.distributed.exit import ending_program, exit_now
    from jax_mla_cp.distributed.leader import Leader
    from jax_mla_cp.distributed.leading_runner import LeadingRunner
    from jax_mla_cp.distributed.signals import SignalThread
    from jax_mla_cp.engine import Engine
    from jax_mla_cp.engine.step_runner import StepRunner
    from jax_mla_cp.launch import detect, set_up_devices
    from jax_mla_cp.serve import logs, security
    from jax_mla_cp.serve.announcement import announcement
    from jax_mla_cp.serve.app import create_app
    from jax_mla_cp.serve.lifecycle import Server, uvicorn_config
    from jax_mla_cp.serve.loading import load
    from jax_mla_cp.serve.middleware import MiddlewareStack
    from jax_mla_cp.serve.served_model import ServedModel
    from jax_mla_cp.serve.server_flags import make_parser
    from jax_mla_cp.serve.server_options import ServerOptions, parse
    from jax_mla_cp.serve.several_hosts import describe, drain_on_signal, follow, serve_together
    from jax_mla_cp.serve.status import Telemetry, server_info

log = logging.getLogger("jax_mla_cp.serve")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the server until it is stopped.

    Returns:
      The exit code: 0; 1 if running requests were cut off. As one of several processes, it ends the process instead, with 1 also
      if another one was lost.

    Raises:
      SystemExit: with code 2, for a setting that can't work.
    """
    config = parse(argv)
    with (
        SignalThread(_exit_while_loading) as signals,
        ending_program(config, make_parser()),
        logs.to_stderr(config.log_level, config.log_format),
    ):
        config = detect(config)
        if config.process_id:
            follow(config, signals)
        keys = security.read_keys(config.api_key_file, os.environ)
        tls = security.tls_settings(config.ssl_certfile, config.ssl_keyfile, config.ssl_keyfile_password_file)
        security.warn_if_open(config.host, keys, tls=bool(tls))
        middleware = MiddlewareStack(keys, config.cors_origins, config.max_body_mb << 20, config.log_requests)
        with _listen(config) as listener:
            code = _serve(config, listener, middleware, tls, signals)
    if config.is_cluster:
        exit_now(code)
    return code


def _exit_while_loading() -> None:
    """Exits at once: while loading there is nothing to finish."""
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


def _serve(
    config: ServerOptions,
    listener: socket.socket,
    middleware: MiddlewareStack,
    tls: dict[str, Any],
    signals: SignalThread,
) -> int:
    started = time.perf_counter()
    log.info("starting JAX: mesh %s, %d devices", config.mesh, config.mesh.devices)
    devices = set_up_devices(config, lambda member: drain_on_signal(member, signals))
    log.info("running on %d %s devices", config.mesh.devices, devices.platform)
    leader = devices.member
    if leader is None:
        loaded = load(config, devices)
        stepper: StepRunner = loaded.runner
    else:
        assert isinstance(leader, Leader)
        with leader.failing_all(describe):
            loaded = load(config, devices)
            leader.cluster.wait_for_all("ready")
        stepper = LeadingRunner(loaded.runner, leader)
    runner, tokenizer, model = loaded.runner, loaded.tokenizer, loaded.runner.planner.model
    telemetry = Telemetry(
        server_info(config.served_model_name, runner, tokenizer),
        None if leader is None else lambda: leader.processes,
    )
    # The cluster has a watchdog of its own, which knows the programs' first runs.
    watchdog = config.watchdog_seconds if leader is None else None
    engine = Engine(
        stepper,
        max_queued=config.max_queued,
        observer=telemetry,
        watchdog_seconds=watchdog,
        overlap=config.overlap,
    )
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
        tool_parser=config.tool_parser,
        reasoning_parser=config.reasoning_parser,
    )
    app = create_app(served, middleware, telemetry)
    server = Server(uvicorn_config(app, tls), engine, middleware.drain, config.drain_timeout)
    if leader is not None:
        serve_together(leader, engine, server, config.watchdog_seconds)
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
        signals.action = server.begin_drain  # until uvicorn takes the signals
        server.run(sockets=[listener])
    finally:
        engine.stop(timeout=60)
        failed = 0 if leader is None else leader.stop()
        log.info("stopped")
    return failed or int(server.cut_off)


if __name__ == "__main__":
    sys.exit(main())
