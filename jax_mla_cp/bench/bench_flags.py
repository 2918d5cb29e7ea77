"""The benchmarks' command line: the commands, their flags, and examples."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from jax_mla_cp.bench.bench_options import Command, Options, make
from jax_mla_cp.bench.quantities import as_flag, listed, number, shape
from jax_mla_cp.cli import Parser, fail, mesh, path, platform
from jax_mla_cp.config import presets
from jax_mla_cp.config.errors import ConfigError
from jax_mla_cp.launch.flags import add_cluster_flags


def parse(argv: Sequence[str] | None = None) -> Options:
    """Reads a command line. Ends the process with code 2 and one line for flags that can't work."""
    parser = make_parser()
    values: dict[str, Any] = vars(parser.parse_args(argv))
    given: dict[str, Any] = {k: tuple(value) if isinstance(value, list) else value for k, value in values.items()}
    try:
        return make(**given)
    except ConfigError as error:
        fail(error, parser, values["command"])


_METHOD = """method: a sample enqueues a program back to back for at least 20 ms, waits once, and divides by the number of calls. The
median of --samples samples is reported; sampling stops early once 3 or more samples took 1 s. Inputs are random and made on the device.
`of roof` is a row's roofline time divided by its measured time. The roofline is its FLOPs at the matmul peak, or its bytes at
the copy or read bandwidth, all measured in the same run. A row that fails does not stop the others; --json is written after
every row."""

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

The GPU runs as the mesh's first device. JAX's mocked topology compiles the real sharded program; collectives take no time and
their results are random numbers.

{_METHOD}""",
    "model": f"""examples:
  python -m jax_mla_cp.bench model --json model.json
  python -m jax_mla_cp.bench model --seq 128K --long none --forms expanded --ep-axes tp --layers 8
  python -m jax_mla_cp.bench model --platform cpu --model tiny --seq 1K --long 4K --chunk 2K --layers 2

The GPU runs as the mesh's first device. JAX's mocked topology compiles the real sharded program; collectives take no time and
their results are random numbers. Communication time comes from a link model: 360 GB/s NVLink within tp, 50 GB/s network
across cp, per GPU and direction.

{_METHOD}""",
    "decode": f"""examples:
  python -m jax_mla_cp.bench decode --json decode.json
  python -m jax_mla_cp.bench decode --shapes 64x8K,8x128K --heads 16 --full --weights bf16,fp8
  python -m jax_mla_cp.bench decode --platform cpu --shapes 4x128 --heads 2  # try it without a GPU

A program calls the kernel on different regions of the cache in turn, as layers do, so that the L2 cache holds none of them.
--mesh, --ep-axes, --layers, --weights and --fp8-compute are for --full.

{_METHOD}""",
    "scaling": f"""examples:
  python -m jax_mla_cp.bench scaling --json scaling.json
  python -m jax_mla_cp.bench scaling --meshes tp=1 cp=8 tp=8 tp=4,cp=2 --seq 128K
  python -m jax_mla_cp.bench scaling --model deepseek_v3 --meshes tp=8 tp=4,cp=2 --layers 12 --ep-axes tp,cp
  python -m jax_mla_cp.bench scaling --platform cpu --model tiny --seq 1K  # try it without a GPU

Needs as many GPUs as the largest mesh; tp=1 is one GPU. Weights are random: deepseek_v2_lite's 31 GB fit one GPU of 80 GB.

On several hosts, start the same command on each, with its own --process-id (or, under Slurm, with --distributed alone):
  python -m jax_mla_cp.bench scaling --meshes tp=8,cp=4 tp=4,cp=8 --coordinator 10.0.0.1:8476 --num-processes 4 --process-id 0
Every mesh must then use all GPUs of all processes. Process 0 reports; a sample's time is that of the slowest process. A row
that fails, or a process that is lost, ends all of them: what was measured before is in --json.

{_METHOD}""",
    "engine": f"""examples:
  python -m jax_mla_cp.bench engine --json engine.json
  python -m jax_mla_cp.bench engine --meshes tp=1 tp=2 --shapes 1x1K,64x1K
  python -m jax_mla_cp.bench engine --platform cpu --model tiny --shapes 2x64  # try it without a GPU

Needs as many GPUs as the largest mesh; tp=1 is one GPU. Each row runs 128 decode steps of all its requests, after their prompts.

{_METHOD}""",
    "host": """examples:
  python -m jax_mla_cp.bench host --json host.json
  python -m jax_mla_cp.bench host --mesh tp=8,cp=1 --shapes 64x1K,64x128K
  python -m jax_mla_cp.bench host --processes 2  # what it costs to lead another process

method: the host's part of a decode step, as in the server: arrays are made for a planner sized for the largest of --shapes, and
results are read from arrays of zeros. No model runs. Only the transfer (put, a column of its own) uses devices, as many as the
mesh has; on a CPU they are virtual. The median of --samples samples is reported, each of at least 20 ms of calls.

With --processes N, process 0 of a cluster is measured: it sends each step to N - 1 real processes over loopback, which receive,
check, decode and echo it as followers do, but have no devices. send: making, encoding and sending the message, on the thread that
steps; ms includes it. echo: processor time of the threads that handle the echoes, while a server's stepping thread waits for its
devices. send masks: as send, when every request's tokens are restricted by a mask, as by a JSON schema. Medians of 200 steps, some
milliseconds apart, as in a server: processors and their caches have done other work in between.""",
    "load": """examples:
  python -m jax_mla_cp.bench load --platform cpu --json load.json
  python -m jax_mla_cp.bench load --gb 40 --scratch /mnt/nvme

method: a random bfloat16 checkpoint of --gb GB is written to a temporary directory and converted to Orbax. The two loaders load
it in turn, once to warm up; the median of --samples loads is reported. Cold: after dropping its files from the page cache.
GB/s counts the model's bytes. Memory is the process's peak anonymous memory, less what it held before.""",
}


_COMMANDS: dict[Command, tuple[str, str]] = {
    "attention": (
        "FlashAttention-3, unsharded and for each rank of a cp group, compared with cuDNN.",
        "--attention --model --dtype --seq --heads --cp --forms",
    ),
    "layer": (
        "One rank's MLA and MoE layers of a full-size model, whole and in parts.",
        "--attention --model --dtype --seq --mesh --ep-axes --forms --weights --fp8-compute --layers --profile",
    ),
    "model": (
        "One rank of the whole model: time to first token, memory, communication.",
        "--attention --model --dtype --seq --long --chunk --mesh --ep-axes --forms --weights --fp8-compute --layers",
    ),
    "decode": (
        "Decode attention, and with --full the whole decode step.",
        "--attention --model --dtype --shapes --heads --tokens --full --layers --mesh --ep-axes --weights --fp8-compute",
    ),
    "load": (
        "Loading a checkpoint from safetensors and from Orbax: time and host memory.",
        "--dtype --gb --scratch --mesh",
    ),
    "scaling": (
        "Prefill of a whole model on several meshes of this host's GPUs, or of several hosts', with real collectives.",
        "--attention --model --dtype --meshes --seq --ep-axes --forms --weights --fp8-compute --layers",
    ),
    "engine": (
        "Decode steps of the whole engine, in process: a step dispatched before the one before is read, or not.",
        "--attention --model --dtype --meshes --shapes --chunk --ep-axes --weights --fp8-compute",
    ),
    "host": (
        "The host's part of a decode step: scheduling, making arrays, transferring them, reading results.",
        "--model --shapes --mesh --processes",
    ),
}
"""Each command's description, and its flags besides `_ALL`."""
_ALL = "--json --quick --samples --platform"


def make_parser() -> argparse.ArgumentParser:
    """The parser of `python -m jax_mla_cp.bench`, whose commands' namespaces have the `Options` fields that were given."""
    raw = argparse.RawDescriptionHelpFormatter
    p = Parser(
        prog="python -m jax_mla_cp.bench",
        description="Benchmarks of jax_mla_cp: kernels and one rank of a 32-GPU program on one GPU, compared with its roofline; "
        "the model on several GPUs; the host; and a running server.",
        epilog="python -m jax_mla_cp.bench COMMAND --help lists a command's flags, with examples.\n\n" + _METHOD,
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
            default = as_flag(getattr(defaults, flag.removeprefix("--").replace("-", "_")))
            known = _FLAGS[flag]
            sub.add_argument(flag, **known | {"help": known["help"] + (f" (default: {default})" if default else "")})
        if name == "scaling":
            add_cluster_flags(sub)
    # Listed here, run by bench/serve and bench/peer: __main__ hands them over before this parser sees them.
    for elsewhere, what in (
        ("serve", "Load test of a running OpenAI server: latencies, throughput, goodput."),
        ("peer", "The same requests to this project's engine and to any OpenAI server: TTFT and decode steps."),
    ):
        commands.add_parser(elsewhere, help=what, add_help=False)
    return p


_FLAGS: dict[str, dict[str, Any]] = {
    "--json": {"metavar": "FILE", "type": path, "help": "write the rows as JSON"},
    "--quick": {"action": "store_true", "help": "fewer rows and samples"},
    "--samples": {"metavar": "N", "type": number, "help": "samples per row"},
    "--platform": {
        "metavar": "{cuda,gpu,cpu}",
        "type": platform("cuda", "cpu"),
        "help": "cpu: smoke test with small sizes",
    },
    "--attention": {"metavar": "{auto,fa3,xla}", "help": "attention kernel; auto: the fastest that runs here"},
    "--model": {"metavar": "NAME", "help": f"model whose sizes are used: {', '.join(presets.names())}"},
    "--dtype": {"metavar": "{bfloat16,float32}", "help": "dtype of weights, activations and cache"},
    "--seq": {"metavar": "N,N,...", "type": listed(number), "help": "prompt lengths in tokens, e.g. 8K,128K"},
    "--long": {
        "metavar": "N,N,...",
        "type": listed(number, none=True),
        "help": "lengths of prompts prefilled in chunks, on 2 layers; or none",
    },
    "--chunk": {"metavar": "N", "type": number, "help": "tokens per chunk of prompts (model: of --long ones)"},
    "--heads": {"metavar": "N,N,...", "type": listed(number), "help": "heads per rank; DeepSeek-V3 at tp=8 has 16"},
    "--cp": {"metavar": "N,N,...", "type": listed(number), "help": "cp group sizes"},
    "--forms": {"metavar": "FORM,FORM", "type": listed(str), "help": "forms of attention: expanded,absorbed"},
    "--mesh": {"metavar": "AXES", "type": mesh, "help": "mesh of GPUs, mocked on one, e.g. tp=8,cp=4"},
    "--meshes": {
        "metavar": "AXES",
        "nargs": "+",
        "type": mesh,
        "help": "meshes to measure, each compared with the first",
    },
    "--ep-axes": {
        "metavar": "AXES",
        "nargs": "+",
        "type": str,
        "help": 'mesh axes that divide the experts, one or more choices: none (tp divides their width) tp "tp,cp"',
    },
    "--weights": {
        "metavar": "NAME,NAME",
        "type": listed(str),
        "help": "weights of whole layers and models: bf16 (in --dtype), fp8 (kept in FP8)",
    },
    "--fp8-compute": {
        "metavar": "NAME,NAME",
        "type": listed(str),
        "help": "what weights in FP8 are multiplied by: w8a16 (activations in --dtype), w8a8 (of many tokens, in FP8 too)",
    },
    "--layers": {
        "metavar": "N",
        "type": number,
        "help": "layers that are run (default: layer and decode 4, model as many as fit, scaling all)",
    },
    "--profile": {
        "metavar": "DIR",
        "type": path,
        "help": "record a trace in DIR, and add a table of its time by named scope",
    },
    "--shapes": {"metavar": "NxN,...", "type": listed(shape), "help": "requests x context length, e.g. 64x8K,8x128K"},
    "--tokens": {
        "metavar": "N,N,...",
        "type": listed(number),
        "help": "query tokens per request: 1 decodes, 4 verifies three drafts",
    },
    "--gb": {"metavar": "N", "type": number, "help": "checkpoint size in GB"},
    "--scratch": {
        "metavar": "DIR",
        "type": path,
        "help": "directory for two copies of the checkpoint (default: the system's temporary directory)",
    },
    "--processes": {
        "metavar": "N",
        "type": number,
        "help": "processes that share the mesh, all on this host; those but the first only receive and echo the steps",
    },
    "--full": {"action": "store_true", "help": "also run the model's whole decode step, as one GPU of --mesh"},
}
