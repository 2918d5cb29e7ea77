"""The options and flags of `bench serve`: one frozen `ClientOptions`, checked without the server."""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import math
import os
from collections.abc import Sequence
from pathlib import Path

from jax_mla_cp.bench.serve.workload import Lengths, SharedPrefix
from jax_mla_cp.cli import Parser, check_output, check_url, fail, path, real_number, whole_number
from jax_mla_cp.config.errors import ConfigError

_PICTURES = (".png", ".pdf", ".svg")
GOALS = ("ttft", "itl", "tpot", "e2e")


@dataclasses.dataclass(frozen=True)
class ClientOptions:
    """The load and the server. A field is the flag of the same name.

    Raises:
      ConfigError: a value out of bounds.
    """

    base_url: str
    """With its /v1."""
    model: str | None = None
    """None: the only one that the server has."""
    rate: float = 1.0
    """Requests per second."""
    burstiness: float = 1.0
    concurrency: int | None = None
    requests: int = 100
    prompt_tokens: Lengths = dataclasses.field(default_factory=lambda: Lengths(512, 512))
    output_tokens: Lengths = dataclasses.field(default_factory=lambda: Lengths(64, 64))
    shared_prefix: SharedPrefix | None = None
    goodput: dict[str, float] = dataclasses.field(default_factory=dict)
    """Bounds in seconds by name, see `GOALS`."""
    timeout: float = 600.0
    """Seconds for one answer, from the moment when it is sent."""
    seed: int = 0
    json: Path | None = None
    picture: Path | None = None
    api_key_env: str | None = None

    def __post_init__(self) -> None:
        check_url("base_url", self.base_url)
        for field, number in (("rate", self.rate), ("burstiness", self.burstiness), ("timeout", self.timeout)):
            if not number > 0 or (math.isinf(number) and field != "rate"):
                raise ConfigError(field, f"must be a number above 0, got {number:g}.")
        for field, count, low, high in (
            ("requests", self.requests, 1, 10_000_000),
            ("concurrency", 1 if self.concurrency is None else self.concurrency, 1, 100_000),
            ("seed", self.seed, 0, 2**63 - 1),
        ):
            if not low <= count <= high:
                raise ConfigError(field, f"must be a whole number from {low} to {high}, got {count}.")
        if self.api_key_env is not None and not os.environ.get(self.api_key_env):
            raise ConfigError(
                "api_key_env", f"the environment has no {self.api_key_env}. Set it to the server's API key."
            )
        for field, file in (("json", self.json), ("picture", self.picture)):
            check_output(field, file)
        if self.picture is not None and self.picture.suffix not in _PICTURES:
            raise ConfigError("picture", f"{self.picture} must end in {', '.join(_PICTURES)}.")
        needed = ("aiohttp", "matplotlib") if self.picture else ("aiohttp",)
        for module in needed:
            if importlib.util.find_spec(module) is None:
                raise ConfigError(
                    "bench serve", f"{module} is missing. Install it with pip install 'jax-mla-cp[bench]'."
                )

    @property
    def headers(self) -> dict[str, str]:
        return {"authorization": f"Bearer {os.environ[self.api_key_env]}"} if self.api_key_env else {}


def parse(argv: Sequence[str] | None = None) -> ClientOptions:
    """Reads a command line. Ends the process with code 2 and one line for flags that can't work."""
    parser = make_parser()
    values = vars(parser.parse_args(argv))
    try:
        for name in ("prompt_tokens", "output_tokens"):
            if name in values:
                values[name] = Lengths.parse(name, values[name])
        if "shared_prefix" in values:
            values["shared_prefix"] = SharedPrefix.parse(values["shared_prefix"])
        if "goodput" in values:
            values["goodput"] = _goals(values["goodput"])
        return ClientOptions(**values)
    except ConfigError as error:
        fail(error, parser)


def _goals(text: str) -> dict[str, float]:
    """ttft:500ms,itl:50ms -> seconds by name."""
    goals = {}
    for part in text.split(","):
        name, _, bound = part.partition(":")
        unit = 1e-3 if bound.endswith("ms") else 1.0
        try:
            seconds = float(bound.removesuffix("ms").removesuffix("s")) * unit
        except ValueError:
            seconds = math.nan
        if name not in GOALS or name in goals or not 0 < seconds < math.inf:
            raise ConfigError(
                "goodput",
                f"must be NAME:TIME,.. with {', '.join(GOALS)}, each once, and times in ms or s, got {text!r}. "
                "Use e.g. ttft:500ms,itl:50ms.",
            )
        goals[name] = seconds
    return goals


_EPILOG = """examples:
  python -m jax_mla_cp.bench serve --base-url http://127.0.0.1:8000/v1 --rate 4 --requests 200
  python -m jax_mla_cp.bench serve --base-url http://127.0.0.1:8000/v1 --rate inf --concurrency 64 --requests 500 \\
    --prompt-tokens lognormal:512:0.8:4096 --output-tokens 16-256 --goodput ttft:2s,itl:100ms --picture load.png

method: times of sending, lengths and prompts follow from --seed before the first request is sent, and no answer delays a
later request. All latencies are measured from the planned send time: waiting for --concurrency, or for a client that
can't keep up, is part of TTFT (`sent late` reports it). Prompts are cut from documentation as token ids, made by
the server's own /tokenize, and as words where it has none. Every request is greedy, streams, goes over a connection of its own,
and generates all of its output tokens (ignore_eos). ITL are the gaps between the chunks that carry tokens.

goodput: requests that meet every SLO, in all and per second: ttft and e2e from the planned time, tpot the mean gap, itl the
longest gap of the request. A failed request meets none.

exit code: 0 done; 1 no request succeeded; 2 invalid option, or no such server; 130 Ctrl-C, after the tables
"""


def make_parser() -> argparse.ArgumentParser:
    """The parser of `python -m jax_mla_cp.bench serve`: a namespace of the fields that were given."""
    p = Parser(
        prog="python -m jax_mla_cp.bench serve",
        description="Load test of a running OpenAI server (this one, SGLang, vLLM): latencies and throughput of /v1/completions.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,  # the defaults are ClientOptions'
        allow_abbrev=False,
    )
    server = p.add_argument_group("server")
    server.add_argument("--base-url", metavar="URL", required=True, help="base URL of the server, with /v1")
    server.add_argument("--model", metavar="NAME", help="model to use (default: the server's only one)")
    server.add_argument(
        "--api-key-env",
        metavar="NAME",
        help="environment variable with the API key (default: no key is sent)",
    )
    server.add_argument(
        "--timeout", metavar="S", type=real_number, help="timeout per request in seconds (default: 600)"
    )
    load = p.add_argument_group("load")
    load.add_argument("--requests", metavar="N", type=whole_number, help="number of requests (default: 100)")
    load.add_argument(
        "--rate", metavar="R", type=real_number, help="requests per second, or inf: all at once (default: 1)"
    )
    load.add_argument(
        "--burstiness",
        metavar="B",
        type=real_number,
        help="shape of the gamma-distributed gaps: 1 is a Poisson process, less comes in bursts, more comes evenly "
        "(default: 1)",
    )
    load.add_argument(
        "--concurrency",
        metavar="N",
        type=whole_number,
        help="maximum number of concurrent requests (default: no limit)",
    )
    load.add_argument(
        "--prompt-tokens",
        metavar="DIST",
        help="prompt lengths: N, LOW-HIGH or lognormal:MEDIAN:SIGMA:MAX (default: 512)",
    )
    load.add_argument("--output-tokens", metavar="DIST", help="output lengths, as --prompt-tokens (default: 64)")
    load.add_argument(
        "--shared-prefix",
        metavar="TOKENS:GROUPS",
        help="shared prefixes: each prompt starts with one of GROUPS texts of TOKENS tokens (default: none)",
    )
    load.add_argument(
        "--seed", metavar="N", type=whole_number, help="random seed for times, lengths and prompts (default: 0)"
    )
    out = p.add_argument_group("results")
    out.add_argument(
        "--goodput", metavar="NAME:TIME,..", help=f"count the requests that meet these SLOs: {', '.join(GOALS)}"
    )
    out.add_argument("--json", metavar="FILE", type=path, help="write the tables and every request as JSON")
    out.add_argument(
        "--picture", metavar="FILE", type=path, help="draw latencies and requests in flight: .png, .pdf or .svg"
    )
    return p
