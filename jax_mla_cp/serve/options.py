"""The server's flags: one frozen `ServeConfig`, checked as far as that goes without a device or a checkpoint."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, NoReturn, TypeVar, get_args

from jax_mla_cp.config import ConfigError, Form, Implementation
from jax_mla_cp.load import Dtype, EpAxes
from jax_mla_cp.mesh import MeshShape
from jax_mla_cp.platform import Platform, default_compile_cache
from jax_mla_cp.quantization import Weights

Speculative = Literal["off", "mtp"]
LogLevel = Literal["debug", "info", "warning", "error"]
_Number = TypeVar("_Number", int, float)

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
    warmup: bool = False
    compile_cache: str = "auto"
    """A directory, "auto" (under the user's cache folder) or "off"."""
    host: str = "127.0.0.1"
    port: int = 8000
    log_level: LogLevel = "info"

    def __post_init__(self) -> None:
        for name, kind in _CHOICES.items():
            _one_of(name, getattr(self, name), get_args(kind))
        for name, (low, high) in _WHOLE.items():
            _whole(name, getattr(self, name), low, high)
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
    "platform": Platform, "dtype": Dtype, "weights": Weights, "ep_axes": EpAxes, "attention": Implementation, "form": Form,
    "speculative": Speculative, "log_level": LogLevel,
}  # fmt: skip
_WHOLE: dict[str, tuple[int, int]] = {
    "port": (0, 65535),
    "page_size": (1, 65536),
    "kv_pages": (1, _MOST),
    "prefill_chunk": (1, _MOST),
    "max_model_len": (2, _MOST),  # a prompt token and a sampled one
    "max_running": (1, 4096),
    "draft_tokens": (1, 4),
    "seed": (0, 2**63 - 1),
}


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


class Parser(argparse.ArgumentParser):
    """Errors in one line, like those of the checks behind it."""

    def error(self, message: str) -> NoReturn:
        flags = [flag for action in self._actions for flag in action.option_strings]
        unknown = message.removeprefix("unrecognized arguments: ").split("=")[0].split()[0]
        if message.startswith("unrecognized"):
            close = difflib.get_close_matches(unknown, flags, n=1)
            message = f"{unknown}: no such flag. " + (f"Did you mean {close[0]}?" if close else "See --help.")
        fail(message.removeprefix("argument "))


def fail(message: object) -> NoReturn:
    """Ends the process for a setting that can't work.

    Raises:
      SystemExit: with code 2.
    """
    print(f"error: {' '.join(str(message).split())}", file=sys.stderr)
    raise SystemExit(2)


def parse(argv: Sequence[str] | None = None) -> ServeConfig:
    """The flags of a command line. Ends the process with code 2 and one line if they can't work."""
    values = vars(_parser().parse_args(argv))
    try:
        if isinstance(values.get("mesh"), str):
            values["mesh"] = MeshShape.parse(values["mesh"])
        return ServeConfig(**values)
    except ConfigError as error:
        fail(error)


def _number(kind: Callable[[str], _Number], what: str) -> Callable[[str], _Number]:
    def parse(text: str) -> _Number:
        try:
            return kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"must be {what}, got {text!r}.") from None

    return parse


_int = _number(int, "a whole number")
_float = _number(float, "a number")


def _int_or_auto(text: str) -> int | None:
    return None if text == "auto" else _int(text)


_EPILOG = """examples:
  python -m jax_mla_cp.serve                                 the built-in model on one device
  python -m jax_mla_cp.serve --mesh tp=8,cp=4                on 32: GPUs, or virtual CPU devices made for it
  python -m jax_mla_cp.serve --mesh tp=8,cp=4 --model DIR    a DeepSeek-V3-style checkpoint

endpoints:
  POST /v1/completions, GET /v1/models, GET /health, GET /version; OpenAPI at /openapi.json, to try out at /docs
"""


def _parser() -> argparse.ArgumentParser:
    p = Parser(
        prog="python -m jax_mla_cp.serve",
        description="Serves an MLA model with prefill context parallelism, for OpenAI clients.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,  # the defaults are ServeConfig's
        allow_abbrev=False,
    )
    add_model_flags(p)
    _add_server_flags(p)
    return p


def add_model_flags(p: argparse.ArgumentParser) -> None:
    """The flags that say what model runs on what devices and in what steps, fields of `ServeConfig`: other programs have
    them too."""
    model = p.add_argument_group("model")
    model.add_argument("--model", metavar="DIR", type=lambda t: Path(t).expanduser(),
                       help="Hugging Face model directory (config.json, *.safetensors, tokenizer.json), or what `python -m "
                            "jax_mla_cp.checkpoint convert` made of one; default: the small model that comes with the "
                            "program")  # fmt: skip
    model.add_argument(
        "--served-model-name", metavar="NAME", help="what clients send as `model`; default: the directory's name"
    )
    model.add_argument("--dtype", metavar="{auto,float32,bfloat16}",
                       help="of weights, activations and cache; auto: float32 on CPU, bfloat16 on GPUs")  # fmt: skip
    model.add_argument("--weights", metavar="{auto,bf16,fp8}",
                       help="of a quantised checkpoint; bf16: dequantised while loading, to --dtype (so also to float32); fp8: "
                            "kept in FP8, half the memory, dequantised by every use; auto: fp8 on GPUs, else bf16")  # fmt: skip
    devices = p.add_argument_group("devices")
    devices.add_argument("--mesh", metavar="AXES",
                         help="tp=8,cp=4[,dp=2] in any order; tp divides heads, cp the tokens of a step, dp the requests; an "
                              "axis that is missing is 1 (default: one device)")  # fmt: skip
    devices.add_argument("--platform", metavar="{auto,cpu,cuda}",
                         help="auto: GPUs if there are any; cpu makes as many virtual devices as the mesh needs")  # fmt: skip
    devices.add_argument("--ep-axes", metavar='{auto,tp,"tp,cp","tp,cp,dp"}',
                         help="the axes that divide the experts; auto: the fewest whose weights fit")  # fmt: skip
    devices.add_argument(
        "--attention",
        metavar="{auto,fa3,xla}",
        help="the kernel; auto: FlashAttention-3 on a Hopper GPU that can run it, else XLA",
    )
    devices.add_argument("--form", metavar="{auto,expanded,absorbed}",
                         help="of MLA attention: over per-head keys or over latents; auto: by each request's shape")  # fmt: skip
    steps = p.add_argument_group("steps")
    steps.add_argument(
        "--page-size",
        metavar="N",
        type=_int,
        help="tokens of a cache page; FlashAttention-3 needs a multiple of 64 (default: 64)",
    )
    steps.add_argument("--prefill-chunk", metavar="N", type=_int,
                       help="most prompt tokens of a dp group in a step; longer prompts take several, with decoding in between "
                            "(default: 2048)")  # fmt: skip
    steps.add_argument("--compile-cache", metavar="{auto,off,DIR}",
                       help=f"where compiled programs are kept (default: {default_compile_cache()})")  # fmt: skip


def _add_server_flags(p: argparse.ArgumentParser) -> None:
    memory = p.add_argument_group("memory and schedule, each per dp group")
    memory.add_argument(
        "--kv-pages", metavar="N", type=_int_or_auto, help="pages of the cache; auto: what --memory-fraction allows"
    )
    memory.add_argument("--memory-fraction", metavar="F", type=_float,
                        help="share of a device's memory for weights, temporaries and cache (default: 0.9 of a GPU's, half of "
                             "the RAM that is free, which virtual CPU devices share)")  # fmt: skip
    memory.add_argument("--max-model-len", metavar="N", type=_int_or_auto,
                        help="longest prompt and continuation; auto: the smaller of the model's and what the pages hold")  # fmt: skip
    memory.add_argument("--max-running", metavar="N", type=_int, help="most requests at a time (default: 32)")
    speculation = p.add_argument_group("speculative decoding: the same answers, several tokens a step")
    speculation.add_argument("--speculative", metavar="{off,mtp}",
                             help="mtp: the checkpoint's layer for multi-token prediction guesses the next tokens, and the "
                                  "model's next step keeps those that it would have said (default: off)")  # fmt: skip
    speculation.add_argument("--draft-tokens", metavar="N", type=_int,
                             help="guesses per request and step, 1 to 4; more than 1 pays if most of them are accepted, "
                                  "which /health tells (default: 1)")  # fmt: skip
    start = p.add_argument_group("start")
    start.add_argument("--warmup", action=argparse.BooleanOptionalAction,
                       help="compile every program before serving, behind a progress bar; without, each at its first use")  # fmt: skip
    start.add_argument("--seed", metavar="N", type=_int,
                       help="the seed of requests that carry none (default: a fresh one each)")  # fmt: skip
    http = p.add_argument_group("HTTP")
    http.add_argument("--host", metavar="ADDRESS", help="where to listen (default: 127.0.0.1, this machine only)")
    http.add_argument("--port", metavar="N", type=_int, help="0: any free one (default: 8000)")
    http.add_argument(
        "--log-level", metavar="{debug,info,warning,error}", help="default: info; prompts and answers are never logged"
    )
