"""The benchmarks' command line: what each command is for, its flags, and examples."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from typing import Any

from jax_mla_cp.bench.bench_options import Command, Options, make
from jax_mla_cp.cli import Parser, fail, mesh, path, platform
from jax_mla_cp.config import presets
from jax_mla_cp.config.errors import ConfigError
from jax_mla_cp.mesh import MeshShape

_K = 1024


def parse(argv: Sequence[str] | None = None) -> Options:
    """Reads a command line. Ends the process with code 2 and one line for flags that can't work."""
    parser = make_parser()
    values: dict[str, Any] = vars(parser.parse_args(argv))
    given: dict[str, Any] = {k: tuple(value) if isinstance(value, list) else value for k, value in values.items()}
    try:
        return make(**given)
    except ConfigError as error:
        fail(error, parser, values["command"])


def _number(text: str) -> int:
    """A whole number, K and M standing for 1024 and 1024^2."""
    factor = {"k": _K, "m": _K * _K}.get(text[-1:].lower(), 1)
    digits = text if factor == 1 else text[:-1]
    if not (digits.isascii() and digits.isdigit()):
        raise argparse.ArgumentTypeError(f"must be whole numbers (K and M may follow), got {text!r}.")
    return int(digits) * factor


def _list(of: Callable[[str], Any], *, none: bool = False) -> Callable[[str], tuple[Any, ...]]:
    """`none`: the word stands for an empty list."""

    def parse(text: str) -> tuple[Any, ...]:
        return () if none and text == "none" else tuple(of(part) for part in text.split(","))

    return parse


def _shape(text: str) -> tuple[int, int]:
    requests, times, context = text.partition("x")
    if not times:
        raise argparse.ArgumentTypeError(f"must be REQUESTSxCONTEXT, e.g. 64x8K, got {text!r}.")
    return _number(requests), _number(context)


_METHOD = """method: a sample enqueues a program so often that it takes 20 ms or more, back to back, waits once, and divides;
the median of --samples samples counts (3 or more, until they took 1 s together). Random data, made on the device.
A row's `of roof` is the time of its FLOPs and bytes at the matmul peak and the copy or read bandwidth that the same
run has measured, divided by its own time. Rows fail alone; --json is written after every row."""

_EPILOG: dict[str, str] = {
    "attention": f"""examples:
  python -m jax_mla_cp.bench attention --json attention.json
  python -m jax_mla_cp.bench attention --seq 128K --heads 16,128 --cp 4
  python -m jax_mla_cp.bench attention --platform cpu --seq 256 --heads 2  # try it without a GPU

{_METHOD}""",
    "layer": f"""examples:
  python -m jax_mla_cp.bench layer --json layer.json
  python -m jax_mla_cp.bench layer --forms expanded --ep-axes tp --profile /tmp/trace
  python -m jax_mla_cp.bench layer --seq 128K,128 --ep-axes tp --weights bf16,fp8  # prefill, and few tokens as in decoding
  python -m jax_mla_cp.bench layer --platform cpu --model tiny --seq 1K  # try it without a GPU

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
  python -m jax_mla_cp.bench decode --platform cpu --shapes 4x128 --heads 2  # try it without a GPU

Calls go over different regions of the cache ("layers") within one program, so that no L2 cache serves them.

{_METHOD}""",
    "scaling": f"""examples:
  python -m jax_mla_cp.bench scaling --json scaling.json
  python -m jax_mla_cp.bench scaling --meshes tp=1 cp=8 tp=8 tp=4,cp=2 --seq 128K
  python -m jax_mla_cp.bench scaling --model deepseek_v3 --meshes tp=8 tp=4,cp=2 --layers 12 --ep-axes tp,cp
  python -m jax_mla_cp.bench scaling --platform cpu --model tiny --seq 1K  # try it without a GPU

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


_COMMANDS: dict[Command, tuple[str, str]] = {
    "attention": (
        "FlashAttention-3, unsharded and every rank of a cp group in turn, beside cuDNN.",
        "--attention --model --dtype --seq --heads --cp --forms",
    ),
    "layer": (
        "A rank's MLA and MoE layers of a full-size model, whole and in parts.",
        "--attention --model --dtype --seq --mesh --ep-axes --forms --weights --layers --profile",
    ),
    "model": (
        "A rank's whole model: time to first token, memory, communication.",
        "--attention --model --dtype --seq --long --chunk --mesh --ep-axes --forms --layers",
    ),
    "decode": (
        "Attention of decoding requests, and with --full the whole decode step.",
        "--attention --model --dtype --shapes --heads --tokens --full --layers --mesh --ep-axes",
    ),
    "load": (
        "Loading a checkpoint, safetensors beside Orbax: time and the host's memory.",
        "--dtype --gb --scratch --mesh",
    ),
    "scaling": (
        "A whole model's prefill on meshes of the GPUs that are here, with real collectives.",
        "--attention --model --dtype --meshes --seq --ep-axes --forms --layers",
    ),
    "host": (
        "What the host does for a step: works to arrays, to the devices, and results to outcomes.",
        "--model --shapes --mesh",
    ),
}
"""What each is for, and its flags beside `_ALL`'s."""
_ALL = "--json --quick --samples --platform"


def make_parser() -> argparse.ArgumentParser:
    """The parser of `python -m jax_mla_cp.bench`, whose commands' namespaces have the `Options` fields that were given."""
    raw = argparse.RawDescriptionHelpFormatter
    p = Parser(
        prog="python -m jax_mla_cp.bench",
        description="Times the kernels and the real 32-GPU program of jax_mla_cp on one GPU, beside what the GPU can do; "
        "the model on several GPUs; and the server.",
        epilog="python -m jax_mla_cp.bench COMMAND --help tells each one's flags, with examples.\n\n" + _METHOD,
        formatter_class=raw,
        allow_abbrev=False,
    )
    commands = p.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=Parser)
    for name, (what, flags) in _COMMANDS.items():
        sub = commands.add_parser(
            name,
            help=what,
            description=what,
            epilog=_EPILOG[name],
            formatter_class=raw,
            argument_default=argparse.SUPPRESS,
            allow_abbrev=False,
        )
        defaults = make(name)
        for flag in f"{_ALL} {flags}".split():
            default = _as_flag(getattr(defaults, flag.removeprefix("--").replace("-", "_")))
            known = _FLAGS[flag]
            sub.add_argument(flag, **known | {"help": known["help"] + (f" (default: {default})" if default else "")})
    # Listed here, run by bench/serve: __main__ hands it over before this parser sees it.
    commands.add_parser(
        "serve", help="Load on a running OpenAI server: latencies, throughput, goodput.", add_help=False
    )
    return p


def _as_flag(value: Any) -> str:
    """A default as one would type it; "" for one that says nothing."""
    if isinstance(value, bool) or value is None:
        return ""
    if isinstance(value, int):
        return next(
            (f"{value // size}{unit}" for size, unit in ((_K * _K, "M"), (_K, "K")) if value % size == 0), str(value)
        )
    if isinstance(value, tuple):
        if value and isinstance(value[0], tuple):
            return ",".join("x".join(map(_as_flag, shape)) for shape in value)
        spaced = any(isinstance(part, MeshShape) or "," in str(part) for part in value)
        return (" " if spaced else ",").join(map(_as_flag, value))
    return str(value)


_FLAGS: dict[str, dict[str, Any]] = {
    "--json": {"metavar": "FILE", "type": path, "help": "the rows, as JSON"},
    "--quick": {"action": "store_true", "help": "fewer rows and samples"},
    "--samples": {"metavar": "N", "type": _number, "help": "samples of a row"},
    "--platform": {
        "metavar": "{cuda,gpu,cpu}",
        "type": platform("cuda", "cpu"),
        "help": "cpu: to try the program with small sizes",
    },
    "--attention": {"metavar": "{auto,fa3,xla}", "help": "the kernel; auto: the fastest that runs here"},
    "--model": {"metavar": "NAME", "help": f"whose sizes: {', '.join(presets.names())}"},
    "--dtype": {"metavar": "{bfloat16,float32}", "help": "of weights, activations and cache"},
    "--seq": {"metavar": "N,N,...", "type": _list(_number), "help": "tokens of the prompt, e.g. 8K,128K"},
    "--long": {
        "metavar": "N,N,...",
        "type": _list(_number, none=True),
        "help": "prompts that are prefilled chunk by chunk, with 2 layers; or none",
    },
    "--chunk": {"metavar": "N", "type": _number, "help": "tokens of a chunk of those"},
    "--heads": {"metavar": "N,N,...", "type": _list(_number), "help": "heads of the rank: 16 is DeepSeek-V3 at tp=8"},
    "--cp": {"metavar": "N,N,...", "type": _list(_number), "help": "sizes of the cp group"},
    "--forms": {"metavar": "FORM,FORM", "type": _list(str), "help": "expanded,absorbed"},
    "--mesh": {"metavar": "AXES", "type": mesh, "help": "the GPUs that are mocked, e.g. tp=8,cp=4"},
    "--meshes": {
        "metavar": "AXES",
        "nargs": "+",
        "type": mesh,
        "help": "one after the other, the first to compare with",
    },
    "--ep-axes": {
        "metavar": "AXES",
        "nargs": "+",
        "type": str,
        "help": 'what divides the experts, one or several: tp "tp,cp"',
    },
    "--weights": {
        "metavar": "NAME,NAME",
        "type": _list(str),
        "help": "of the whole layers: bf16 (--dtype's), fp8 (kept so, dequantized by every use)",
    },
    "--layers": {
        "metavar": "N",
        "type": _number,
        "help": "layers that really run (default: layer 4, model as many as fit, decode 4, scaling all)",
    },
    "--profile": {
        "metavar": "DIR",
        "type": path,
        "help": "record a trace there, and add a table of its time by named scope",
    },
    "--shapes": {"metavar": "NxN,...", "type": _list(_shape), "help": "requests x context, e.g. 64x8K,8x128K"},
    "--tokens": {
        "metavar": "N,N,...",
        "type": _list(_number),
        "help": "queries of a request: 1 decodes, 4 verify three drafts",
    },
    "--gb": {"metavar": "N", "type": _number, "help": "size of the checkpoint, in GB"},
    "--scratch": {
        "metavar": "DIR",
        "type": path,
        "help": "where it is written, twice (default: the system's temporary directory)",
    },
    "--full": {"action": "store_true", "help": "also the model's whole decode step, as one of the mesh's GPUs"},
}
