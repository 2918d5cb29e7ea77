"""The server's flags: one frozen `ServeConfig`, checked as far as that goes without a device or a checkpoint."""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, get_args

from jax_mla_cp.attention import Implementation
from jax_mla_cp.batch.form import Form
from jax_mla_cp.cli import fail
from jax_mla_cp.config.errors import ConfigError
from jax_mla_cp.config.quantization import Weights
from jax_mla_cp.launch import Dtype, EpAxes
from jax_mla_cp.mesh import MeshShape
from jax_mla_cp.platform import Platform
from jax_mla_cp.serve.flags import make_parser

Speculative = Literal["off", "mtp"]
LogLevel = Literal["debug", "info", "warning", "error"]
LogFormat = Literal["text", "json"]

_MOST = 2**31 - 1  # token and page counts live in int32 on the device


@dataclasses.dataclass(frozen=True)
class ServeConfig:
    """What the operator asks for. A field is the flag of the same name; None leaves it to the program.

    Raises:
      ConfigError: a value out of bounds, in one line that starts with the flag.
    """

    model: Path | None = None
    served_model_name: str = ""
    """What clients send as `model`. Empty: becomes the model directory's name."""
    mesh: MeshShape = dataclasses.field(default_factory=MeshShape)
    platform: Platform = "auto"
    dtype: Dtype = "auto"
    weights: Weights = "auto"
    ep_axes: EpAxes = "auto"
    attention: Implementation = "auto"
    form: Form = "auto"
    page_size: int = 64
    kv_pages: int | None = None
    memory_fraction: float | None = None
    prefill_chunk: int = 2048
    max_model_len: int | None = None
    max_running: int = 32
    speculative: Speculative = "off"
    draft_tokens: int | None = None
    """None: 1 with speculation. DeepSeek-V3's layer is trained to guess one token, and 85 to 90% of these are right
    (arXiv:2412.19437, section 5.4.3); those after it are right less often, and each costs a pass of the layer."""
    seed: int | None = None
    warmup: bool | None = None
    """None: on GPUs, where each program takes XLA 8 to 16 s and a request would wait for it."""
    compile_cache: str = "auto"
    """A directory, "auto" (under the user's cache folder) or "off"."""
    host: str = "127.0.0.1"
    port: int = 8000
    ssl_certfile: Path | None = None
    """Certificate chain in PEM form. None: plain HTTP."""
    ssl_keyfile: Path | None = None
    """Its private key. None: it is in `ssl_certfile` too."""
    ssl_keyfile_password_file: Path | None = None
    api_key_file: Path | None = None
    """Keys, one a line. `JAX_MLA_CP_API_KEY` in the environment adds to them; with neither, anyone may ask."""
    cors_origins: tuple[str, ...] = ()
    """Origins whose web pages may call the server, or only "*"."""
    max_body_mb: int = 16
    """MiB. The default holds a prompt of a million token ids."""
    max_queued: int = 1024
    """Requests that may wait to run, over all dp groups."""
    queue_timeout: float | None = None
    """Seconds that a request may wait to run; None: no limit. So too the next two."""
    request_timeout: float | None = None
    watchdog: float | None = 600.0
    drain_timeout: float = 30.0
    """Seconds."""
    log_level: LogLevel = "info"
    log_format: LogFormat = "text"
    log_requests: bool = False

    def __post_init__(self) -> None:
        for name, kind in _CHOICES.items():
            _one_of(name, getattr(self, name), get_args(kind))
        for name, (low, high) in _WHOLE.items():
            _whole(name, getattr(self, name), low, high)
        for name, least in _SECONDS.items():
            _seconds(name, getattr(self, name), least)
        _check_origins(self.cors_origins)
        if self.ssl_certfile is None and (self.ssl_keyfile or self.ssl_keyfile_password_file):
            raise ConfigError("--ssl-keyfile: a key needs its certificate. Add --ssl-certfile FILE.")
        fraction = self.memory_fraction
        if fraction is not None and not (math.isfinite(fraction) and 0 < fraction <= 1):
            raise ConfigError(f"--memory-fraction: must be above 0 and at most 1, got {fraction}. Try 0.9.")
        if not self.host.strip():
            raise ConfigError(
                "--host: must be an address or a host name, got ''. Use 127.0.0.1, or 0.0.0.0 for all interfaces."
            )
        if not self.compile_cache:
            raise ConfigError("--compile-cache: must be a directory, auto or off, got ''.")
        if self.speculative == "off" and self.draft_tokens is not None:
            raise ConfigError("--draft-tokens: without speculation there are no drafts. Add --speculative mtp.")
        if self.speculative == "mtp" and self.draft_tokens is None:
            object.__setattr__(self, "draft_tokens", 1)
        name = self.served_model_name or self._default_name()
        object.__setattr__(self, "served_model_name", name)
        if len(name) > 256 or not name.isprintable() or " " in name:
            raise ConfigError(
                f"--served-model-name: must be at most 256 printable characters without spaces, got {name!r}."
            )
        if self.model is not None:
            if not self.model.is_dir():
                raise ConfigError(f"--model: {self.model} is not a directory. Give a Hugging Face model directory.")
            if not (self.model / "config.json").is_file():
                raise ConfigError(f"--model: {self.model} has no config.json. Give a Hugging Face model directory.")

    def _default_name(self) -> str:
        name = "" if self.model is None else "-".join(self.model.resolve().name.split())
        return name or "jax-mla-cp-tiny"


_CHOICES: dict[str, Any] = {
    "platform": Platform,
    "dtype": Dtype,
    "weights": Weights,
    "ep_axes": EpAxes,
    "attention": Implementation,
    "form": Form,
    "speculative": Speculative,
    "log_level": LogLevel,
    "log_format": LogFormat,
}
_WHOLE: dict[str, tuple[int, int]] = {
    "port": (0, 65535),
    "page_size": (1, 65536),
    "kv_pages": (1, _MOST),
    "prefill_chunk": (1, _MOST),
    "max_model_len": (2, _MOST),  # a prompt token and a sampled one
    "max_running": (1, 4096),
    "max_queued": (1, 1_000_000),
    "max_body_mb": (1, 1024),
    "draft_tokens": (1, 4),
    "seed": (0, 2**63 - 1),
}
_SECONDS: dict[str, float] = {"queue_timeout": 0.001, "request_timeout": 0.001, "watchdog": 1.0, "drain_timeout": 0.0}
_WEEK = 7 * 24 * 3600.0


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _one_of(name: str, value: object, allowed: Sequence[str]) -> None:
    if value not in allowed:
        close = difflib.get_close_matches(str(value), allowed, n=1)
        hint = f" Did you mean {close[0]}?" if close else ""
        raise ConfigError(f"{_flag(name)}: must be one of {' | '.join(allowed)}, got {value!r}.{hint}")


def _whole(name: str, value: object, low: int, high: int) -> None:
    if value is None and name in ("kv_pages", "max_model_len", "draft_tokens", "seed"):
        return
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise ConfigError(f"{_flag(name)}: must be a whole number from {low} to {high}, got {value!r}.")


def _seconds(name: str, value: float | None, low: float) -> None:
    if value is None and name != "drain_timeout":
        return
    if not isinstance(value, int | float) or isinstance(value, bool) or not low <= value <= _WEEK:
        raise ConfigError(f"{_flag(name)}: must be seconds from {low:g} to {_WEEK:.0f} (a week), got {value!r}.")


def _check_origins(origins: Sequence[str]) -> None:
    for origin in origins:
        if origin == "*" and len(origins) > 1:
            raise ConfigError("--cors-origins: * is every origin, so it stands alone. Leave the others out.")
        if origin != "*" and not re.fullmatch(r"https?://[A-Za-z0-9.\-\[\]:]+", origin):
            raise ConfigError(
                "--cors-origins: must be origins like https://chat.example.org or http://localhost:3000 (scheme, host, "
                f"port, no path), with commas between, got {origin!r}."
            )


def parse(argv: Sequence[str] | None = None) -> ServeConfig:
    """The flags of a command line. Ends the process with code 2 and one line if they can't work."""
    values = vars(make_parser().parse_args(argv))
    try:
        if isinstance(values.get("mesh"), str):
            values["mesh"] = MeshShape.parse(values["mesh"])
        return ServeConfig(**values)
    except ConfigError as error:
        fail(error)
