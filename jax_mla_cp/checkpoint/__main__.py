"""python -m jax_mla_cp.checkpoint: convert and inspect. `--help` tells what they do."""

from __future__ import annotations

import argparse
import json
import signal
import sys
from collections.abc import Sequence
from types import FrameType
from typing import NoReturn, get_args

from jax_mla_cp.version import program_imports

with program_imports():
    from jax_mla_cp.checkpoint.errors import CheckpointError
    from jax_mla_cp.checkpoint.orbax import command
    from jax_mla_cp.cli import Parser, mesh, path, print_error
    from jax_mla_cp.config.errors import ConfigError
    from jax_mla_cp.config.quantization import Weights


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command. Exit code 0; 1 for a checkpoint that isn't sound; 2 for a setting that can't work; 130 after Ctrl-C."""
    parser = make_parser()
    args = parser.parse_args(argv)
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        return _convert(args) if args.command == "convert" else _inspect(args)
    except ConfigError as error:
        print_error(error, parser, args.command)
        return 1 if isinstance(error, CheckpointError) else 2


def _interrupt(number: int, frame: FrameType | None) -> NoReturn:
    raise KeyboardInterrupt


def _convert(args: argparse.Namespace) -> int:
    from jax_mla_cp.checkpoint.convert import convert

    try:
        summary = convert(args.model, args.out, weights=args.weights, overwrite=args.overwrite)
    except KeyboardInterrupt:
        print(
            f"\ninterrupted. Nothing written is lost. Resume with: {command(args.model, args.out)}",
            file=sys.stderr,
            flush=True,
        )
        return 130
    written = summary.slices - summary.skipped
    print(
        f"{args.out}: complete, {summary.nbytes / 1e9:.2f} GB in {summary.slices} slices"
        + (f" ({written} written, {summary.skipped} already there)" if summary.skipped else "")
        + f"\nserve it with: python -m jax_mla_cp.serve --model {args.out}"
    )
    return 0


def _inspect(args: argparse.Namespace) -> int:
    from jax_mla_cp.checkpoint.inspect import inspect, show

    try:
        report = inspect(args.model, mesh=args.mesh, ep_axes=args.ep_axes, verify=args.verify)
    except KeyboardInterrupt:
        return 130
    if args.json:
        print(json.dumps(report, indent=1))
    else:
        show(report, tensors=args.tensors)
    return int(bool(report["problems"]))


_EPILOG = """examples:
  python -m jax_mla_cp.checkpoint inspect DeepSeek-V3 --mesh tp=8,cp=4     contents, and the share of each device
  python -m jax_mla_cp.checkpoint convert DeepSeek-V3 DeepSeek-V3-orbax    convert to Orbax; rerun to resume
  python -m jax_mla_cp.checkpoint inspect DeepSeek-V3-orbax --verify       read every byte and verify checksums
  python -m jax_mla_cp.serve --model DeepSeek-V3-orbax --mesh tp=8,cp=4

exit codes: 0; 1 invalid checkpoint; 2 invalid option; 130 Ctrl-C."""

_CONVERT = """Converts a Hugging Face directory to an Orbax checkpoint that loads on any mesh, with a checksum for every
part. OUT gets everything that a server needs: the weights in the checkpoint's own dtypes, config.json, the tokenizer."""

_CONVERT_EPILOG = """Memory: the largest tensor and about 0.3 GB, whatever the model's size. Disk: as much as the weights.
Interrupted (Ctrl-C, kill, a full disk), run the same command again: it writes what is missing. Run on a complete OUT, it
writes files that are missing or of the wrong size, and copies config.json and the tokenizer again.

layout of OUT: config.json and the tokenizer; jax_mla_cp.json, the manifest; weights/, an Orbax checkpoint of the model's
parameters (orbax.checkpoint.v1.load reads it)."""

_INSPECT = """Summarizes a Hugging Face or converted checkpoint: parameters and bytes by dtype and by part of the model, missing
or damaged parts, and the bytes of each device of a mesh. Reads headers only, unless --verify."""


def make_parser() -> argparse.ArgumentParser:
    """The parser of `python -m jax_mla_cp.checkpoint`."""
    raw = argparse.RawDescriptionHelpFormatter
    p = Parser(
        prog="python -m jax_mla_cp.checkpoint",
        description="Converts Hugging Face checkpoints (safetensors) to Orbax, and inspects either kind.",
        epilog=_EPILOG,
        formatter_class=raw,
        allow_abbrev=False,
    )
    commands = p.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=Parser)
    convert = commands.add_parser(
        "convert",
        help="convert a Hugging Face directory to an Orbax checkpoint",
        description=_CONVERT,
        epilog=_CONVERT_EPILOG,
        formatter_class=raw,
        allow_abbrev=False,
    )
    convert.add_argument("model", metavar="HF_DIR", type=path, help="directory with config.json and *.safetensors")
    convert.add_argument(
        "out", metavar="OUT", type=path, help="directory to write: new, empty, or from an interrupted run"
    )
    convert.add_argument(
        "--weights",
        choices=get_args(Weights),
        default="auto",
        help="storage of a quantized checkpoint: fp8 (also auto) keeps FP8, bf16 dequantizes (default: auto)",
    )
    convert.add_argument("--overwrite", action="store_true", help="delete an earlier conversion in OUT first")
    inspect = commands.add_parser(
        "inspect",
        help="what a checkpoint holds, and whether it is sound",
        description=_INSPECT,
        formatter_class=raw,
        allow_abbrev=False,
    )
    inspect.add_argument("model", metavar="DIR", type=path, help="a Hugging Face directory, or what convert made")
    inspect.add_argument("--mesh", metavar="AXES", type=mesh, help="also what each device would hold, e.g. tp=8,cp=4")
    inspect.add_argument(
        "--ep-axes",
        metavar='{none,tp,"tp,cp","tp,cp,dp"}',
        default="tp",
        help="what divides the experts on it; none: tp divides their width (default: tp)",
    )
    inspect.add_argument(
        "--tensors", action="store_true", help="a table of the tensors, those of all layers in one row"
    )
    inspect.add_argument(
        "--verify",
        action="store_true",
        help="read everything: checksums (converted checkpoints have them), and numbers that are not finite",
    )
    inspect.add_argument("--json", action="store_true", help="everything as JSON, to stdout")
    return p


if __name__ == "__main__":
    sys.exit(main())
