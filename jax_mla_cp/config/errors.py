"""The error for a parameter that can't work, and the two checks that most parameters need."""

from __future__ import annotations

import difflib
from collections.abc import Sequence


class ConfigError(ValueError):
    """A parameter that can't work. `str(error)` is "field: message".

    Messages are written for Python callers: another parameter is `page_size=64`, or its bare name in backticks.
    `jax_mla_cp.cli` turns both, and the field, into flags.
    """

    def __init__(self, field: str, message: str):
        """
        Args:
          field: the parameter, as the caller of the library names it; or the file that is at fault.
          message: the expected value, the given one, and the change to make.
        """
        super().__init__(field, message)
        self.field = field
        self.message = message

    def __str__(self) -> str:
        return f"{self.field}: {self.message}"


def check_choice(field: str, value: object, choices: Sequence[str]) -> None:
    """
    Raises:
      ConfigError: `value` is not one of the choices.
    """
    if value not in choices:
        close = difflib.get_close_matches(str(value), choices, n=1)
        hint = f" Did you mean {close[0]}?" if close else ""
        raise ConfigError(field, f"must be one of {' | '.join(choices)}, got {value!r}.{hint}")


def check_whole(field: str, value: object, low: int, high: int) -> None:
    """
    Raises:
      ConfigError: `value` is not a whole number from `low` to `high`.
    """
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise ConfigError(field, f"must be a whole number from {low} to {high}, got {value!r}.")
