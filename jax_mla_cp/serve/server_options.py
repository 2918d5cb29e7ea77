"""The server's options: one frozen `ServerOptions`, checked without a device or a checkpoint."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, get_args

from jax_mla_cp.cli import fail
from jax_mla_cp.config.errors import ConfigError, check_choice, check_whole
from jax_mla_cp.launch import LaunchOptions
from jax_mla_cp.serve.reasoning import ReasoningFormat
from jax_mla_cp.serve.server_flags import make_parser
from jax_mla_cp.serve.tool_calls import FORMATS

LogLevel = Literal["debug", "info", "warning", "error"]
LogFormat = Literal["text", "json"]


@dataclasses.dataclass(frozen=True)
class ServerOptions(LaunchOptions):
    """The server's options. A field is the flag of the same name; None leaves the value to the program.

    Raises:
      ConfigError: a value out of bounds.
    """

    served_model_name: str = ""
    """The model's name for clients. Empty: becomes the model directory's name."""
    seed: int | None = None
    tool_parser: str = "auto"
    """As in `jax_mla_cp.serve.served_model.ServedModel`."""
    reasoning_parser: ReasoningFormat = "auto"
    warmup: bool | None = None
    """None: on GPUs, where each program takes XLA 8 to 16 s and a request would wait for it."""
    host: str = "127.0.0.1"
    port: int = 8000
    ssl_certfile: Path | None = None
    """Certificate chain in PEM form. None: plain HTTP."""
    ssl_keyfile: Path | None = None
    """Its private key. None: it is in `ssl_certfile` too."""
    ssl_keyfile_password_file: Path | None = None
    api_key_file: Path | None = None
    """Keys, one a line. `JAX_MLA_CP_API_KEY` in the environment adds to them; with neither, the server needs no key."""
    cors_origins: tuple[str, ...] = ()
    """Origins whose web pages may call the server, or only "*"."""
    max_body_mb: int = 16
    """MiB. The default holds a prompt of a million token ids."""
    max_queued: int = 1024
    """Requests that may wait to run, over all dp groups."""
    queue_timeout: float | None = None
    """Seconds that a request may wait to run; None: no limit. The same holds for the next two fields."""
    request_timeout: float | None = None
    watchdog: float | Literal["auto"] | None = "auto"
    """As in `watchdog_seconds`."""
    overlap: bool = True
    """Dispatch a step before the one before it is read."""
    drain_timeout: float = 30.0
    """Seconds."""
    log_level: LogLevel = "info"
    log_format: LogFormat = "text"
    log_requests: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("tool_parser", self.tool_parser, ("auto", *FORMATS, "none"))
        check_choice("reasoning_parser", self.reasoning_parser, get_args(ReasoningFormat))
        check_choice("log_level", self.log_level, get_args(LogLevel))
        check_choice("log_format", self.log_format, get_args(LogFormat))
        for name, (low, high) in _WHOLE.items():
            check_whole(name, getattr(self, name), low, high)
        if self.seed is not None:
            check_whole("seed", self.seed, 0, 2**63 - 1)
        for name, least in _SECONDS.items():
            _seconds(name, getattr(self, name), least)
        _check_origins(self.cors_origins)
        if self.ssl_certfile is None and (self.ssl_keyfile or self.ssl_keyfile_password_file):
            raise ConfigError("ssl_keyfile", "a key needs its certificate. Add `ssl_certfile`.")
        if not self.host.strip():
            raise ConfigError(
                "host", "must be an address or a host name, got ''. Use 127.0.0.1, or 0.0.0.0 for all interfaces."
            )
        name = self.served_model_name or self.model_name
        object.__setattr__(self, "served_model_name", name)
        if len(name) > 256 or not name.isprintable() or " " in name:
            raise ConfigError(
                "served_model_name", f"must be at most 256 printable characters without spaces, got {name!r}."
            )

    @property
    def watchdog_seconds(self) -> float | None:
        """Seconds that a step may take; None: any time. By default 600, of which a compilation is part; 60 with several processes,
        where a program's first run has ten times as long."""
        return self.watchdog if self.watchdog != "auto" else 60.0 if self.is_cluster else 600.0


_WHOLE: dict[str, tuple[int, int]] = {
    "port": (0, 65535),
    "max_queued": (1, 1_000_000),
    "max_body_mb": (1, 1024),
}
_SECONDS: dict[str, float] = {"queue_timeout": 0.001, "request_timeout": 0.001, "watchdog": 1.0, "drain_timeout": 0.0}
_WEEK = 7 * 24 * 3600.0


def _seconds(name: str, value: float | str | None, low: float) -> None:
    if (value is None and name != "drain_timeout") or (value == "auto" and name == "watchdog"):
        return
    if not isinstance(value, int | float) or isinstance(value, bool) or not low <= value <= _WEEK:
        raise ConfigError(name, f"must be seconds from {low:g} to {_WEEK:.0f} (a week), got {value!r}.")


def _check_origins(origins: Sequence[str]) -> None:
    for origin in origins:
        if origin == "*" and len(origins) > 1:
            raise ConfigError("cors_origins", "* is every origin, so it stands alone. Leave the others out.")
        if origin != "*" and not re.fullmatch(r"https?://[A-Za-z0-9.\-\[\]:]+", origin):
            raise ConfigError(
                "cors_origins",
                "must be origins like https://chat.example.org or http://localhost:3000 (scheme, host, port, no path), with "
                f"commas between, got {origin!r}.",
            )


def parse(argv: Sequence[str] | None = None) -> ServerOptions:
    """Reads a command line. Ends the process with code 2 and one line for flags that can't work."""
    parser = make_parser()
    values = vars(parser.parse_args(argv))
    try:
        return ServerOptions(**values)
    except ConfigError as error:
        fail(error, parser)
