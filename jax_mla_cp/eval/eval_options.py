"""The evaluation's options and flags: one frozen `EvalOptions`, checked without a device or a checkpoint."""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import math
from collections.abc import Sequence
from pathlib import Path

from jax_mla_cp.cli import Parser, check_output, check_url, fail, path
from jax_mla_cp.config.errors import ConfigError
from jax_mla_cp.launch import LaunchOptions
from jax_mla_cp.launch.flags import add_cluster_flags, add_model_flags, take_launch_options

_K = 1024
_PICTURES = (".png", ".pdf", ".svg")


@dataclasses.dataclass(frozen=True)
class EvalOptions:
    """The evaluation's options. A field is the flag of the same name.

    Raises:
      ConfigError: a value out of bounds.
    """

    launch: LaunchOptions = dataclasses.field(default_factory=LaunchOptions)
    """The model that runs in process."""
    base_url: str | None = None
    """The server to ask; None: in process."""
    served_model_name: str | None = None
    """One of that server's models; None: the only one. In process: the model's name in reports."""
    tokenizer: Path | None = None
    lengths: tuple[int, ...] = (512, _K, 2 * _K, 4 * _K, 8 * _K, 16 * _K)
    depths: int = 10
    perplexity_tokens: int = 8 * _K
    text: Path | None = None
    seed: int = 0
    timeout: float = 600.0
    """Seconds that a server may take for one prompt."""
    picture: Path | None = None
    json: Path | None = None

    def __post_init__(self) -> None:
        for field, values, low, high in (
            ("lengths", self.lengths, 2, 1 << 24),
            ("depths", (self.depths,), 2, 1000),
            ("perplexity_tokens", (self.perplexity_tokens,) if self.perplexity_tokens else (), 2, 1 << 24),
            ("seed", (self.seed,), 0, 2**63 - 1),
        ):
            for value in values:
                if not low <= value <= high:
                    raise ConfigError(field, f"must be whole numbers from {low} to {high}, got {value}.")
        if len(set(self.lengths)) < len(self.lengths):
            raise ConfigError("lengths", f"must be unique, got {','.join(map(str, self.lengths))}.")
        if not (self.lengths or self.perplexity_tokens):
            raise ConfigError("lengths", "none and perplexity_tokens=0 leave nothing to run. Leave one of them out.")
        if not (math.isfinite(self.timeout) and self.timeout > 0):
            raise ConfigError("timeout", f"must be a number of seconds above 0, got {self.timeout}.")
        check_url("base_url", self.base_url)
        if self.tokenizer is not None and self.base_url is None:
            raise ConfigError(
                "tokenizer", "is used with `base_url` only; a local model brings its own tokenizer. Leave it out."
            )
        self._check_files()

    def _check_files(self) -> None:
        if self.tokenizer is not None and not self.tokenizer.is_dir():
            raise ConfigError(
                "tokenizer", f"{self.tokenizer} is not a directory. Give the model directory that is served."
            )
        if self.text is not None and not self.text.is_file():
            raise ConfigError("text", f"{self.text} is not a file. Give a text file (UTF-8).")
        for field, file in (("json", self.json), ("picture", self.picture)):
            check_output(field, file)
        if self.picture is not None:
            if self.picture.suffix not in _PICTURES:
                raise ConfigError("picture", f"{self.picture} must end in {', '.join(_PICTURES)}.")
            if importlib.util.find_spec("matplotlib") is None:
                raise ConfigError("picture", "matplotlib is missing. Install it with pip install 'jax-mla-cp[eval]'.")


def parse(argv: Sequence[str] | None = None) -> EvalOptions:
    """Reads a command line. Ends the process with code 2 and one line for flags that can't work."""
    parser = make_parser()
    values = vars(parser.parse_args(argv))
    try:
        launch = take_launch_options(values, EvalOptions)
        return EvalOptions(launch=launch, **values)
    except ConfigError as error:
        fail(error, parser)


def _whole(text: str) -> int:
    """K stands for 1024."""
    digits = text[:-1] if text[-1:] in ("k", "K") else text
    if not (digits.isascii() and digits.isdigit()):
        raise argparse.ArgumentTypeError(f"must be whole numbers (K may follow), got {text!r}.")
    return int(digits) * (1 if digits == text else _K)


def _lengths(text: str) -> tuple[int, ...]:
    return () if text == "none" else tuple(_whole(part) for part in text.split(","))


def _seconds(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a number of seconds, got {text!r}.") from None


_EPILOG = """examples:
  python -m jax_mla_cp.eval                                         the built-in model, in this process
  python -m jax_mla_cp.eval --mesh tp=8,cp=4 --picture map.png      on 32 GPUs, or 32 virtual CPU devices
  python -m jax_mla_cp.eval --model DIR --lengths 4K,32K,128K --text book.txt --json out.json
  python -m jax_mla_cp.eval --base-url http://127.0.0.1:8000/v1     a running server: this one, vLLM, SGLang

A passkey (5 digits, with a name) is hidden in a text and asked for at its end, once for each length and depth. An answer is
greedy, and correct if its first number is the key. Perplexity is measured on windows of 2048 tokens of the same text.

exit code: 0 done, whatever the score; 1 the model or the server failed; 2 invalid option; 130 Ctrl-C
"""


def make_parser() -> argparse.ArgumentParser:
    """The parser of `python -m jax_mla_cp.eval`: a namespace of the fields that were given."""
    p = Parser(
        prog="python -m jax_mla_cp.eval",
        description="Tests whether a model reads its whole context: passkey retrieval by length and depth, and perplexity.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,  # the defaults are EvalOptions' and LaunchOptions'
        allow_abbrev=False,
    )
    test = p.add_argument_group("test")
    test.add_argument(
        "--lengths",
        metavar="N,N,...",
        type=_lengths,
        help="prompt lengths in tokens, or none (default: 512,1K,2K,4K,8K,16K)",
    )
    test.add_argument(
        "--depths",
        metavar="N",
        type=_whole,
        help="number of depths, evenly spaced from the start of the text to its end (default: 10)",
    )
    test.add_argument(
        "--perplexity-tokens",
        metavar="N",
        type=_whole,
        help="number of tokens to measure perplexity on; 0: none (default: 8K)",
    )
    test.add_argument(
        "--text",
        metavar="FILE",
        type=path,
        help="text to hide passkeys in, UTF-8 (default: documentation that comes with the program)",
    )
    test.add_argument(
        "--seed", metavar="N", type=_whole, help="random seed for passkeys and positions in the text (default: 0)"
    )
    out = p.add_argument_group("results")
    out.add_argument("--json", metavar="FILE", type=path, help="write scores and every answer as JSON")
    out.add_argument("--picture", metavar="FILE", type=path, help="draw a heat map, length x depth: .png, .pdf or .svg")
    server = p.add_argument_group("a running server")
    server.add_argument(
        "--base-url", metavar="URL", help="evaluate an OpenAI-compatible server instead of a local model"
    )
    server.add_argument(
        "--tokenizer",
        metavar="DIR",
        type=path,
        help="model directory whose tokenizer counts prompt tokens (default: the built-in model's)",
    )
    server.add_argument("--timeout", metavar="S", type=_seconds, help="timeout per prompt in seconds (default: 600)")
    add_model_flags(p)
    add_cluster_flags(p)
    return p
