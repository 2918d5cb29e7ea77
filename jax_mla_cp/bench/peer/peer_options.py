"""The options and flags of `bench peer`: one frozen `PeerOptions`, checked without a device and a server."""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import math
from collections.abc import Sequence
from pathlib import Path

from jax_mla_cp.bench.quantities import listed, number, shape
from jax_mla_cp.cli import Parser, check_output, check_url, fail, path, real_number, whole_number
from jax_mla_cp.config.errors import ConfigError, check_whole
from jax_mla_cp.launch import LaunchOptions
from jax_mla_cp.launch.flags import add_model_flags, take_launch_options

_K = 1024


@dataclasses.dataclass(frozen=True)
class PeerOptions:
    """The engine and the work. A field is the flag of the same name.

    Raises:
      ConfigError: a value out of bounds.
    """

    launch: LaunchOptions = dataclasses.field(default_factory=LaunchOptions)
    """The model that runs in process."""
    base_url: str | None = None
    """The server to measure; None: in process."""
    served_model_name: str | None = None
    """One of that server's models; None: its only one."""
    vocabulary: int | None = None
    """None: the model's in process, 10000 with a server."""
    ttft: tuple[int, ...] = (8 * _K, 32 * _K)
    shapes: tuple[tuple[int, int], ...] = ((1, _K), (8, _K), (64, _K), (8, 32 * _K))
    generate: tuple[int, ...] = (33, 161)
    samples: int = 3
    seed: int = 0
    timeout: float = 600.0
    json: Path | None = None

    def __post_init__(self) -> None:
        for field, values, low in (
            ("ttft", self.ttft, 1),
            ("shapes", tuple(size for pair in self.shapes for size in pair), 1),
            ("generate", self.generate, 1),
            ("samples", (self.samples,), 1),
            ("vocabulary", () if self.vocabulary is None else (self.vocabulary,), 11),
        ):
            for value in values:
                check_whole(field, value, low, 1 << 24)
        if len(self.generate) != 2 or self.generate[0] >= self.generate[1]:
            raise ConfigError(
                "generate",
                f"must be two numbers of tokens, the second one larger, got {','.join(map(str, self.generate))}. Try 33,161.",
            )
        if not (self.ttft or self.shapes):
            raise ConfigError("ttft", "none and shapes=none leave nothing to run. Leave one of them out.")
        if not (math.isfinite(self.timeout) and self.timeout > 0):
            raise ConfigError("timeout", f"must be a number of seconds above 0, got {self.timeout}.")
        if self.base_url is not None:
            check_url("base_url", self.base_url)
            if importlib.util.find_spec("aiohttp") is None:
                raise ConfigError("base_url", "aiohttp is missing. Install it with pip install 'jax-mla-cp[bench]'.")
        check_output("json", self.json)

    @property
    def longest(self) -> int:
        """Tokens of the longest request, with its output."""
        return max([n + 1 for n in self.ttft] + [context + self.generate[1] for _, context in self.shapes])

    @property
    def most(self) -> int:
        """Requests at a time."""
        return max([1, *(requests for requests, _ in self.shapes)])


def parse(argv: Sequence[str] | None = None) -> PeerOptions:
    """Reads a command line. Ends the process with code 2 and one line for flags that can't work."""
    parser = make_parser()
    values = vars(parser.parse_args(argv))
    try:
        launch = take_launch_options(values, PeerOptions)
        return PeerOptions(launch=launch, **values)
    except ConfigError as error:
        fail(error, parser)


_EPILOG = """examples:
  python -m jax_mla_cp.bench peer --model DIR --prefill-chunk 8192 --json ours.json
  python -m jax_mla_cp.bench peer --base-url http://127.0.0.1:8000/v1 --json theirs.json  # vLLM, SGLang, or this project's server
  python -m jax_mla_cp.bench peer --platform cpu --ttft 64 --shapes 2x32 --generate 3,9  # try it with the built-in model

method: prompts of random token ids, new ones for every run. Time to first token: one request with one token of output, from sending to
its end. Decode step: a run in which each request generates the second number of --generate, less one with the first number, over the
difference; all requests are sent at once. Medians of --samples runs, after one that does not count. Run both engines in the same machine's
life, with the same checkpoint and as large prefill chunks; a server's numbers include HTTP.

exit code: 0 done; 1 a row failed; 2 invalid option; 130 Ctrl-C
"""


def make_parser() -> argparse.ArgumentParser:
    """The parser of `bench peer`: a namespace of the fields that were given."""
    p = Parser(
        prog="python -m jax_mla_cp.bench peer",
        description="Compares engines: the same requests to this project's engine, in process, or to any OpenAI server.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,  # the defaults are PeerOptions' and LaunchOptions'
        allow_abbrev=False,
    )
    work = p.add_argument_group("work")
    work.add_argument(
        "--ttft",
        metavar="N,N,...",
        type=listed(number, none=True),
        help="prompt lengths for the time to first token, or none (default: 8K,32K)",
    )
    work.add_argument(
        "--shapes",
        metavar="NxN,...",
        type=listed(shape, none=True),
        help="requests x context length of the decode steps, or none (default: 1x1K,8x1K,64x1K,8x32K)",
    )
    work.add_argument(
        "--generate",
        metavar="N,N",
        type=listed(number),
        help="output tokens of the short and the long runs (default: 33,161)",
    )
    work.add_argument("--samples", metavar="N", type=whole_number, help="runs of each kind (default: 3)")
    work.add_argument("--seed", metavar="N", type=whole_number, help="random seed of the prompts (default: 0)")
    work.add_argument(
        "--vocabulary",
        metavar="N",
        type=number,
        help="draw token ids below N (default: the model's vocabulary; 10000 with --base-url)",
    )
    work.add_argument("--json", metavar="FILE", type=path, help="write the rows as JSON")
    server = p.add_argument_group("a running server")
    server.add_argument("--base-url", metavar="URL", help="measure an OpenAI-compatible server instead")
    server.add_argument(
        "--timeout", metavar="S", type=real_number, help="timeout per request in seconds (default: 600)"
    )
    add_model_flags(p)
    return p
