"""The programs' common command line: errors in one line and in flags, values, and files that can be written.

The library's errors name parameters. This file alone turns them into flags: `ConfigError("page_size", "must be a multiple of 64,
got 100. Use page_size=128, or attention='xla'.")` is `--page-size: must be a multiple of 64, got 100. Use --page-size 128, or
--attention xla.` A parameter is one that the program's own parser has.
"""

from __future__ import annotations

import argparse
import ast
import difflib
import os
import re
import shlex
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from jax_mla_cp.config.errors import ConfigError, check_choice
from jax_mla_cp.mesh import MeshShape

_Number = TypeVar("_Number", int, float)

_MENTION = re.compile(
    r"""(?<![\w.])'[^']*'(?!\w)  # a quoted value, which stays as it is
    |`(?P<bare>\w+)`
    |(?<![\w.])(?P<name>[a-z]\w*)=(?P<value>'[^']*'|\([^()]*\)|-?\d+(?:\.\d+)?(?!\w))""",
    re.VERBOSE,
)
"""A parameter in an error's message: its name in backticks, or an assignment of a Python literal."""


class Parser(argparse.ArgumentParser):
    """Reports errors in one line, as `fail` does."""

    def error(self, message: str) -> NoReturn:
        unrecognized, unknown, rest = message.partition("unrecognized arguments: ")
        if unknown and not unrecognized:
            argument = (rest.split("=")[0].split() or ["''"])[0]
            close = difflib.get_close_matches(argument, self._flags(), n=1)
            message = f"{argument}: no such flag. " + (f"Did you mean {close[0]}?" if close else "See --help.")
        else:
            message = _translate(message.removeprefix("argument "), _parameters(self))
        _print(message)
        raise SystemExit(2)

    def _flags(self) -> set[str]:
        """The flags of the parser and of its commands."""
        parsers = [self, *_commands(self).values()]
        return {flag for parser in parsers for action in parser._actions for flag in action.option_strings}


def fail(error: ConfigError, parser: argparse.ArgumentParser, command: str | None = None) -> NoReturn:
    """Prints an error in the parser's flags, and ends the process with code 2. Arguments as `print_error`'s."""
    print_error(error, parser, command)
    raise SystemExit(2)


def print_error(error: ConfigError, parser: argparse.ArgumentParser, command: str | None = None) -> None:
    """Prints an error in the parser's flags.

    Args:
      command: the parser's command that ran, whose flags are meant.
    """
    _print(in_flags(error, parser if command is None else _commands(parser)[command]))


def in_flags(error: ConfigError, parser: argparse.ArgumentParser) -> str:
    """The error as the user of a program reads it: its field, and every parameter in its message, as the user writes it.

    Names that the parser does not have stay as they are.
    """
    parameters = _parameters(parser)
    action = parameters.get(error.field)
    return f"{error.field if action is None else _name(action)}: {_translate(error.message, parameters)}"


def _print(message: str) -> None:
    print(f"error: {message}", file=sys.stderr)


def _commands(parser: argparse.ArgumentParser) -> Mapping[str, argparse.ArgumentParser]:
    found = [action.choices for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    return found[0] if found else {}


def _parameters(parser: argparse.ArgumentParser) -> dict[str, argparse.Action]:
    return {action.dest: action for action in parser._actions}


def _translate(message: str, parameters: Mapping[str, argparse.Action]) -> str:
    def flag(match: re.Match[str]) -> str:
        action = parameters.get(match["bare"] or match["name"] or "")
        if action is None:
            return match[0]
        return _name(action) if match["bare"] else _assignment(action, ast.literal_eval(match["value"]))

    return _MENTION.sub(flag, message)


def _name(action: argparse.Action) -> str:
    """The flag, or a positional argument's name in --help."""
    return action.option_strings[0] if action.option_strings else str(action.metavar or action.dest)


def _assignment(action: argparse.Action, value: Any) -> str:
    text = ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
    return f"{_name(action)} {shlex.quote(text)}"


def _number(kind: Callable[[str], _Number], expected: str) -> Callable[[str], _Number]:
    def parse(text: str) -> _Number:
        try:
            return kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"must be {expected}, got {text!r}.") from None

    return parse


# Types for argparse's `type=`.
whole_number = _number(int, "a whole number")
real_number = _number(float, "a number")


def choice(*choices: str, **aliases: str) -> Callable[[str], str]:
    """One of some names. `choice("cpu", "cuda", gpu="cuda")` reads "gpu" as "cuda"."""

    def parse(text: str) -> str:
        value = aliases.get(text, text)
        try:
            check_choice("", value, choices)
        except ConfigError as error:
            raise argparse.ArgumentTypeError(error.message) from None
        return value

    return parse


def platform(*choices: str) -> Callable[[str], str]:
    """A platform; "gpu" is "cuda"."""
    return choice(*choices, gpu="cuda")


def path(text: str) -> Path:
    """A path, with the user's folder for ~."""
    return Path(text).expanduser()


def mesh(text: str) -> MeshShape:
    """A mesh, as "tp=8,cp=4"."""
    try:
        return MeshShape.parse(text)
    except ConfigError as error:
        raise argparse.ArgumentTypeError(error.message) from None


def check_url(field: str, url: str | None) -> None:
    """Checks the address of a server. None: there is none.

    Raises:
      ConfigError: it does not begin with http:// or https://.
    """
    if url is not None and not url.startswith(("http://", "https://")):
        raise ConfigError(field, f"must be an address like http://127.0.0.1:8000/v1, got {url!r}.")


def check_output(field: str, file: Path | None) -> None:
    """Checks before the work, not after it, that its results can be written. None: they needn't be.

    Raises:
      ConfigError: its directory is missing or may not be written, or it exists and is no file: a directory, or /dev/null, whose
        place the results would take.
    """
    if file is None:
        return
    directory = file.absolute().parent
    if not directory.is_dir():
        raise ConfigError(field, f"{file}: the directory {file.parent} does not exist. Make it first.")
    if file.exists() and not file.is_file():
        raise ConfigError(field, f"{file} is not a file. Name one, or a new one.")
    if not os.access(directory, os.W_OK | os.X_OK):
        raise ConfigError(field, f"{file}: the directory {file.parent} can't be written. Name another one.")


def write_output(field: str, file: Path, write: Callable[[Path], object]) -> None:
    """Writes results that `check_output` has passed.

    Raises:
      ConfigError: the file can't be written any more.
    """
    try:
        write(file)
    except OSError as error:
        raise ConfigError(field, f"{file} can't be written ({error.strerror}).") from error
