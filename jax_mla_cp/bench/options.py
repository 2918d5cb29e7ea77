"""The benchmarks' flags: one frozen `Options`, checked as far as that goes without a device."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, NoReturn, get_args

from jax_mla_cp import presets
from jax_mla_cp.config import ConfigError, Implementation
from jax_mla_cp.mesh import MeshShape

Command = Literal["attention", "layer", "model", "decode", "load", "host", "scaling"]
FormName = Literal["expanded", "absorbed"]
EpName = Literal["tp", "tp,cp", "tp,cp,dp"]
WeightsName = Literal["bf16", "fp8"]

_CPU_TOKENS = 8192
"""More than this in one row would take a CPU minutes."""


@dataclasses.dataclass(frozen=True)
class Options:
    """What is asked for. A field is the flag of the same name.

    Raises:
      ConfigError: a value out of bounds, in one line that starts with the flag.
    """

    command: Command
    platform: Literal["cuda", "cpu"] = "cuda"
    model: str = "deepseek_v3"
    attention: Implementation = "auto"
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    samples: int = 10
    quick: bool = False
    json: Path | None = None
    forms: tuple[FormName, ...] = ("expanded", "absorbed")
    seq: tuple[int, ...] = ()
    heads: tuple[int, ...] = ()
    cp: tuple[int, ...] = (4, 8)
    mesh: MeshShape = dataclasses.field(default_factory=lambda: MeshShape(tp=8, cp=4))
    meshes: tuple[MeshShape, ...] = ()
    ep_axes: tuple[EpName, ...] = ("tp", "tp,cp")
    weights: tuple[WeightsName, ...] = ("bf16",)
    layers: int | None = None
    long: tuple[int, ...] = ()
    chunk: int = 65536
    shapes: tuple[tuple[int, int], ...] = ()
    tokens: tuple[int, ...] = (1, 4)
    full: bool = False
    profile: Path | None = None
    gb: int = 4
    scratch: Path | None = None

    def __post_init__(self) -> None:
        _one_of("--platform", self.platform, ("cuda", "cpu"))
        _one_of("--attention", self.attention, get_args(Implementation))
        _one_of("--dtype", self.dtype, ("bfloat16", "float32"))
        _one_of("--model", self.model, presets.names())
        for form in self.forms:
            _one_of("--forms", form, get_args(FormName))
        for ep in self.ep_axes:
            _one_of("--ep-axes", ep, get_args(EpName))
        for weights in self.weights:
            _one_of("--weights", weights, get_args(WeightsName))
        for flag, values, low, high in (
            ("--samples", (self.samples,), 1, 1000),
            ("--seq", self.seq, 1, 1 << 24),
            ("--heads", self.heads, 1, 1024),
            ("--cp", self.cp, 2, 1024),
            ("--layers", () if self.layers is None else (self.layers,), 1, 1000),
            ("--long", self.long, 1, 1 << 24),
            ("--chunk", (self.chunk,), 1, 1 << 24),
            ("--tokens", self.tokens, 1, 64),
            ("--gb", (self.gb,), 1, 10000),
        ):
            for value in values:
                if not low <= value <= high:
                    raise ConfigError(f"{flag}: must be whole numbers from {low} to {high}, got {value}.")
        for flag, mesh in [("--mesh", self.mesh), *(("--meshes", mesh) for mesh in self.meshes)]:
            if mesh.dp != 1:
                raise ConfigError(f"{flag} {mesh}: dp only repeats the same work. Use tp and cp alone, e.g. tp=8,cp=4.")
        if self.json is not None and not self.json.absolute().parent.is_dir():
            raise ConfigError(f"--json {self.json}: the directory {self.json.parent} does not exist. Make it first.")
        if self.scratch is not None and not self.scratch.is_dir():
            raise ConfigError(f"--scratch {self.scratch}: is not a directory. Make it first.")
        if self.platform == "cpu":
            self._check_cpu()

    def _check_cpu(self) -> None:
        if self.command == "host":
            return
        most = max([*self.seq, *self.long, *(n * context for n, context in self.shapes)], default=0)
        if most > _CPU_TOKENS:
            raise ConfigError(
                f"--platform cpu: it is there to try the program, and {most} tokens would take it hours. "
                f"{_SMALL[self.command]}"
            )
        if self.command in ("layer", "model", "scaling") and self.model != "tiny":
            raise ConfigError(f"--platform cpu: {self.model} does not fit a CPU's memory. {_SMALL[self.command]}")


_SMALL: dict[str, str] = {
    "attention": "Give small sizes: --seq 256 --heads 2.",
    "decode": "Give small sizes: --shapes 4x128 --heads 2.",
    "layer": "Give small sizes: --model tiny --seq 1K.",
    "model": "Give small sizes: --model tiny --seq 1K --long 4K --chunk 2K --layers 2.",
    "scaling": "Give small sizes: --model tiny --seq 1K.",
}

_K = 1024
_DEFAULTS: dict[str, dict[str, Any]] = {
    "attention": {"seq": (8 * _K, 32 * _K, 128 * _K), "heads": (16,)},
    "layer": {"seq": (128 * _K,)},
    "model": {"seq": (8 * _K, 32 * _K, 128 * _K), "long": (256 * _K, 512 * _K, 1024 * _K)},
    "decode": {
        "shapes": ((64, 8 * _K), (8, 128 * _K), (256, 2 * _K), (16, 32 * _K), (1, 128 * _K)),
        "heads": (16, 128),
        "mesh": MeshShape(tp=8),
        "ep_axes": ("tp",),
    },
    "load": {"mesh": MeshShape(tp=2, cp=2), "samples": 3},
    "scaling": {
        "model": "deepseek_v2_lite",
        "seq": (8 * _K, 32 * _K, 128 * _K),
        "forms": ("expanded",),
        "ep_axes": ("tp",),
        "meshes": (MeshShape(), MeshShape(cp=2), MeshShape(tp=2)),
    },
    "host": {"platform": "cpu", "shapes": tuple((n, 8 * _K) for n in (1, 8, 16, 32, 64)), "samples": 20},
}
_QUICK: dict[str, dict[str, Any]] = {
    "attention": {"seq": (128 * _K,), "cp": (4,), "samples": 3},
    "layer": {"ep_axes": ("tp",), "forms": ("expanded",), "samples": 3},
    "model": {"seq": (128 * _K,), "long": (), "ep_axes": ("tp",), "forms": ("expanded",), "layers": 8, "samples": 3},
    "decode": {"shapes": ((64, 8 * _K), (8, 128 * _K)), "heads": (16,), "tokens": (1,), "samples": 3},
    "load": {"gb": 1, "samples": 1},
    "host": {"shapes": ((1, 8 * _K), (64, 8 * _K)), "samples": 3},
    "scaling": {"seq": (32 * _K,), "samples": 3},
}


def parse(argv: Sequence[str] | None = None) -> Options:
    """The flags of a command line. Ends the process with code 2 and one line if they can't work."""
    values = vars(_parser().parse_args(argv))
    defaults = _DEFAULTS[values["command"]] | (_QUICK[values["command"]] if values.get("quick") else {})
    try:
        return Options(**(defaults | values))
    except ConfigError as error:
        fail(error)


def fail(message: object) -> NoReturn:
    """Ends the process for a setting that can't work.

    Raises:
      SystemExit: with code 2.
    """
    print(f"error: {' '.join(str(message).split())}", file=sys.stderr)
    raise SystemExit(2)


class _Parser(argparse.ArgumentParser):
    """Errors in one line, like those of the checks behind it."""

    def error(self, message: str) -> NoReturn:
        parsers = [self, *(sub for a in self._actions if isinstance(a.choices, dict) for sub in a.choices.values())]
        flags = {flag for parser in parsers for action in parser._actions for flag in action.option_strings}
        if message.startswith("unrecognized"):
            unknown = message.removeprefix("unrecognized arguments: ").split("=")[0].split()[0]
            close = difflib.get_close_matches(unknown, flags, n=1)
            message = f"{unknown}: no such flag. " + (f"Did you mean {close[0]}?" if close else "See --help.")
        fail(message.removeprefix("argument "))


def _one_of(flag: str, value: object, allowed: Sequence[str]) -> None:
    if value not in allowed:
        close = difflib.get_close_matches(str(value), allowed, n=1)
        hint = f" Did you mean {close[0]}?" if close else ""
        raise ConfigError(f"{flag}: must be one of {' | '.join(allowed)}, got {value!r}.{hint}")


def _number(text: str) -> int:
    """A whole number, K and M standing for 1024 and 1024^2."""
    factor = {"k": _K, "m": _K * _K}.get(text[-1:].lower(), 1)
    digits = text if factor == 1 else text[:-1]
    if not (digits.isascii() and digits.isdigit()):
        raise argparse.ArgumentTypeError(f"must be whole numbers (K and M may follow), got {text!r}.")
    return int(digits) * factor


def _list(of: Callable[[str], Any]) -> Callable[[str], tuple[Any, ...]]:
    def parse(text: str) -> tuple[Any, ...]:
        return () if text == "none" else tuple(of(part) for part in text.split(","))

    return parse


def _shape(text: str) -> tuple[int, int]:
    requests, times, context = text.partition("x")
    if not times:
        raise argparse.ArgumentTypeError(f"must be REQUESTSxCONTEXT, e.g. 64x8K, got {text!r}.")
    return _number(requests), _number(context)


def _mesh(text: str) -> MeshShape:
    try:
        return MeshShape.parse(text)
    except ConfigError as error:
        raise argparse.ArgumentTypeError(str(error).removeprefix("--mesh ")) from None


_METHOD = """method: a sample enqueues a program so often that it takes 20 ms or more, back to back, waits once, and divides;
the median of --samples samples counts (3 or more, until they took 1 s together). Random data, made on the device.
A row's `of roof` is the time of its FLOPs and bytes at the matmul peak and the copy or read bandwidth that the same
run has measured, divided by its own time. Rows fail alone; --json is written after every row."""

_EPILOG: dict[str, str] = {
    "attention": f"""examples:
  python -m jax_mla_cp.bench attention --json attention.json
  python -m jax_mla_cp.bench attention --seq 128K --heads 16,128 --cp 4
  python -m jax_mla_cp.bench attention --platform cpu --seq 256 --heads 2     try it without a GPU

{_METHOD}""",
    "layer": f"""examples:
  python -m jax_mla_cp.bench layer --json layer.json
  python -m jax_mla_cp.bench layer --forms expanded --ep-axes tp --profile /tmp/trace
  python -m jax_mla_cp.bench layer --seq 128K,128 --ep-axes tp --weights bf16,fp8      prefill, and few tokens as in decoding
  python -m jax_mla_cp.bench layer --platform cpu --model tiny --seq 1K      try it without a GPU

The GPU runs as the first of the mesh's: JAX's mocked topology compiles the real program, collectives take no time
and what they would have brought is random numbers.

{_METHOD}""",
    "model": f"""examples:
  python -m jax_mla_cp.bench model --json model.json
  python -m jax_mla_cp.bench model --seq 128K --long none --forms expanded --ep-axes tp --layers 8
  python -m jax_mla_cp.bench model --platform cpu --model tiny --seq 1K --long 4K --chunk 2K --layers 2

The GPU runs as the first of the mesh's: JAX's mocked topology compiles the real program, collectives take no time
and what they would have brought is random numbers. Their time comes from a link model: 360 GB/s NVLink within tp,
50 GB/s network across cp, per GPU and direction.

{_METHOD}""",
    "decode": f"""examples:
  python -m jax_mla_cp.bench decode --json decode.json
  python -m jax_mla_cp.bench decode --shapes 64x8K,8x128K --heads 16 --full
  python -m jax_mla_cp.bench decode --platform cpu --shapes 4x128 --heads 2    try it without a GPU

Calls go over different regions of the cache ("layers") within one program, so that no L2 cache serves them.

{_METHOD}""",
    "scaling": f"""examples:
  python -m jax_mla_cp.bench scaling --json scaling.json
  python -m jax_mla_cp.bench scaling --meshes tp=1 cp=8 tp=8 tp=4,cp=2 --seq 128K
  python -m jax_mla_cp.bench scaling --model deepseek_v3 --meshes tp=8 tp=4,cp=2 --layers 12 --ep-axes tp,cp
  python -m jax_mla_cp.bench scaling --platform cpu --model tiny --seq 1K      try it without a GPU

Needs as many GPUs as the largest mesh. Random weights of the model's sizes: deepseek_v2_lite's 31 GB fit every GPU of 80 GB.
A mesh of one axis of size 1 is one GPU.

{_METHOD}""",
    "host": """examples:
  python -m jax_mla_cp.bench host --json host.json
  python -m jax_mla_cp.bench host --mesh tp=8,cp=1 --shapes 64x1K,64x128K

method: a step of decoding requests is prepared as the server does, for a planner with as many places as the largest of
--shapes asks for, and its outcomes are made of arrays of zeros. Nothing runs on a device but the transfer (put), which has a
column of its own and needs as many devices as the mesh has: on a CPU, virtual ones. The median of --samples samples counts,
each of as many calls as take 20 ms.""",
    "load": """examples:
  python -m jax_mla_cp.bench load --platform cpu --json load.json
  python -m jax_mla_cp.bench load --gb 40 --scratch /mnt/nvme

method: a random bfloat16 checkpoint of --gb GB is written to a temporary directory, and converted. Both loaders load it in
turns, once before anything counts; the median of --samples loads counts. Cold: its files were dropped from the page cache.
GB/s are of the model's bytes; memory is the most anonymous memory that the process held, less what it held before.""",
}


def _parser() -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    p = _Parser(
        prog="python -m jax_mla_cp.bench",
        description="Times the kernels and the real 32-GPU program of jax_mla_cp on one GPU, beside what the GPU can do; "
        "the model on several GPUs; and the server.",
        epilog="python -m jax_mla_cp.bench COMMAND --help tells each one's flags, with examples.\n\n" + _METHOD,
        formatter_class=raw,
        allow_abbrev=False,
    )
    commands = p.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=_Parser)

    def command(name: str, help: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(
            name, help=help, description=help, epilog=_EPILOG[name], formatter_class=raw,
            argument_default=argparse.SUPPRESS, allow_abbrev=False,
        )  # fmt: skip
        sub.add_argument("--json", metavar="FILE", type=lambda t: Path(t).expanduser(), help="the rows, as JSON")
        sub.add_argument("--quick", action="store_true", help="fewer rows and samples")
        sub.add_argument("--samples", metavar="N", type=_number, help="samples of a row (default: 10)")
        sub.add_argument("--platform", metavar="{cuda,cpu}", help="cpu: to try the program with small sizes")
        sub.add_argument("--attention", metavar="{auto,fa3,xla}", help="the kernel; auto: the fastest that runs here")
        sub.add_argument(
            "--model", metavar="NAME", help=f"whose sizes: {', '.join(presets.names())} (default: deepseek_v3)"
        )
        sub.add_argument("--dtype", metavar="{bfloat16,float32}", help="of weights, activations and cache")
        return sub

    def add(sub: argparse.ArgumentParser, *flags: str) -> None:
        for flag in flags:
            sub.add_argument(flag, **_FLAGS[flag])

    add(command("attention", "FlashAttention-3, unsharded and every rank of a cp group in turn, beside cuDNN."),
        "--seq", "--heads", "--cp", "--forms")  # fmt: skip
    add(command("layer", "A rank's MLA and MoE layers of a full-size model, whole and in parts."),
        "--seq", "--mesh", "--ep-axes", "--forms", "--weights", "--layers", "--profile")  # fmt: skip
    add(command("model", "A rank's whole model: time to first token, memory, communication."),
        "--seq", "--long", "--chunk", "--mesh", "--ep-axes", "--forms", "--layers")  # fmt: skip
    add(command("decode", "Attention of decoding requests, and with --full the whole decode step."),
        "--shapes", "--heads", "--tokens", "--full", "--layers", "--mesh", "--ep-axes")  # fmt: skip
    add(command("load", "Loading a checkpoint, safetensors beside Orbax: time and the host's memory."),
        "--gb", "--scratch", "--mesh")  # fmt: skip
    add(command("scaling", "A whole model's prefill on meshes of the GPUs that are here, with real collectives."),
        "--meshes", "--seq", "--ep-axes", "--forms", "--layers")  # fmt: skip
    add(command("host", "What the host does for a step: works to arrays, to the devices, and results to outcomes."),
        "--shapes", "--mesh")  # fmt: skip
    # Listed here, run by bench/serve: __main__ hands it over before this parser sees it.
    commands.add_parser(
        "serve", help="Load on a running OpenAI server: latencies, throughput, goodput.", add_help=False
    )
    return p


_FLAGS: dict[str, dict[str, Any]] = {
    "--seq": {"metavar": "N,N,...", "type": _list(_number), "help": "tokens of the prompt, e.g. 8K,128K"},
    "--long": {"metavar": "N,N,...", "type": _list(_number),
               "help": "prompts that are prefilled chunk by chunk, with 2 layers; or none (default: 256K,512K,1M)"},
    "--chunk": {"metavar": "N", "type": _number, "help": "tokens of a chunk of those (default: 64K)"},
    "--heads": {"metavar": "N,N,...", "type": _list(_number), "help": "heads of the rank: 16 is DeepSeek-V3 at tp=8"},
    "--cp": {"metavar": "N,N,...", "type": _list(_number), "help": "sizes of the cp group (default: 4,8)"},
    "--forms": {"metavar": "FORM,FORM", "type": _list(str), "help": "expanded,absorbed (default: both)"},
    "--mesh": {"metavar": "AXES", "type": _mesh, "help": "the GPUs that are mocked, e.g. tp=8,cp=4"},
    "--meshes": {"metavar": "AXES", "nargs": "+", "type": _mesh,
                 "help": "one after the other, the first to compare with (default: tp=1 cp=2 tp=2)"},
    "--ep-axes": {"metavar": "AXES", "nargs": "+", "type": str,
                  "help": 'what divides the experts, one or several: tp "tp,cp"'},
    "--weights": {"metavar": "NAME,NAME", "type": _list(str),
                  "help": "of the whole layers: bf16 (--dtype's), fp8 (kept so, dequantised by every use) (default: bf16)"},
    "--layers": {"metavar": "N", "type": _number,
                 "help": "layers that really run (default: layer 4, model as many as fit, decode 4, scaling all)"},
    "--profile": {"metavar": "DIR", "type": lambda t: Path(t).expanduser(),
                  "help": "record a trace there, and add a table of its time by named scope"},
    "--shapes": {"metavar": "NxN,...", "type": _list(_shape), "help": "requests x context, e.g. 64x8K,8x128K"},
    "--tokens": {"metavar": "N,N,...", "type": _list(_number),
                 "help": "queries of a request: 1 decodes, 4 verify three drafts (default: 1,4)"},
    "--gb": {"metavar": "N", "type": _number, "help": "size of the checkpoint, in GB (default: 4)"},
    "--scratch": {"metavar": "DIR", "type": lambda t: Path(t).expanduser(),
                  "help": "where it is written, twice (default: the system's temporary directory)"},
    "--full": {"action": "store_true", "help": "also the model's whole decode step, as one of the mesh's GPUs"},
}  # fmt: skip
