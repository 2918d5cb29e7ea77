"""What the programs' command lines have in common: errors in one line, values, and files that can be written."""

from __future__ import annotations

import argparse
import difflib
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn, TypeVar

from jax_mla_cp.config.errors import ConfigError
from jax_mla_cp.mesh import MeshShape

_Number = TypeVar("_Number", int, float)


class Parser(argparse.ArgumentParser):
    """Errors in one line, like those of the checks behind it."""

    def error(self, message: str) -> NoReturn:
        unrecognized, unknown, rest = message.partition("unrecognized arguments: ")
        if unknown and not unrecognized:
            argument = (rest.split("=")[0].split() or ["''"])[0]
            close = difflib.get_close_matches(argument, self._flags(), n=1)
            message = f"{argument}: no such flag. " + (f"Did you mean {close[0]}?" if close else "See --help.")
        fail(message.removeprefix("argument "))

    def _flags(self) -> set[str]:
        """Its own and its commands'."""
        commands = [sub for a in self._actions if isinstance(a.choices, dict) for sub in a.choices.values()]
        return {flag for parser in (self, *commands) for action in parser._actions for flag in action.option_strings}


def fail(message: object) -> NoReturn:
    """Ends the process for a setting that can't work.

    Raises:
      SystemExit: with code 2.
    """
    print(f"error: {' '.join(str(message).split())}", file=sys.stderr)
    raise SystemExit(2)


def _number(kind: Callable[[str], _Number], what: str) -> Callable[[str], _Number]:
    def parse(text: str) -> _Number:
        try:
            return kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"must be {what}, got {text!r}.") from None

    return parse


# What argparse calls for a flag's value.
whole_number = _number(int, "a whole number")
real_number = _number(float, "a number")


def path(text: str) -> Path:
    """With the user's folder for ~."""
    return Path(text).expanduser()


def mesh(text: str) -> MeshShape:
    """tp=8,cp=4."""
    try:
        return MeshShape.parse(text)
    except ConfigError as error:
        raise argparse.ArgumentTypeError(str(error).removeprefix("--mesh ")) from None


def check_output(flag: str, file: Path | None) -> None:
    """Says before the work, not after it, that its results can't be written. None: they needn't be.

    Raises:
      ConfigError: its directory is missing or may not be written, or it is there and no file: a directory, or /dev/null, whose
        place the results would take.
    """
    if file is None:
        return
    directory = file.absolute().parent
    if not directory.is_dir():
        raise ConfigError(f"{flag} {file}: the directory {file.parent} does not exist. Make it first.")
    if file.exists() and not file.is_file():
        raise ConfigError(f"{flag} {file}: is not a file. Name one, or a new one.")
    if not os.access(directory, os.W_OK | os.X_OK):
        raise ConfigError(f"{flag} {file}: the directory {file.parent} can't be written. Name another one.")
