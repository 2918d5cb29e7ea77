"""`Keys`: the keys of a JSON object in config.json, each read as the type that it must have."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from jax_mla_cp.config.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class Keys:
    """An object's keys. null is no key; a key without a default must be there. A "false" in quotes is not false.

    Every method raises `ConfigError` for a value of another type.
    """

    raw: Mapping[str, Any]
    path: str = ""
    """The object's place in config.json, with a dot at its end."""

    def whole(self, key: str, default: int | None = None) -> int:
        value = self._get(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise ConfigError("config.json", f"{self.path}{key} must be a whole number, 0 or more, got {value!r}.")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        value = self._get(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
            raise ConfigError("config.json", f"{self.path}{key} must be a number, 0 or more, got {value!r}.")
        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        value = self._get(key, default)
        if not isinstance(value, bool):
            raise ConfigError("config.json", f"{self.path}{key} must be true or false, got {value!r}.")
        return value

    def part(self, key: str) -> Mapping[str, Any]:
        """An object, empty if it is not there."""
        value = self._get(key, {})
        if not isinstance(value, Mapping):
            raise ConfigError("config.json", f"{self.path}{key} must be an object, got {value!r}.")
        return value

    def has(self, key: str) -> bool:
        return self.raw.get(key) is not None

    def spelling(self, *names: str) -> str:
        """The one of several names of the same number that is there; the first if none is.

        Raises:
          ConfigError: several are there, and their values differ.
        """
        there = [name for name in names if self.has(name)]
        agreed({self.path + name: self.raw[name] for name in there})
        return there[0] if there else names[0]

    def _get(self, key: str, default: Any) -> Any:
        value = self.raw.get(key)
        if value is None:
            value = default
        if value is None:
            raise ConfigError("config.json", f"the key {self.path + key!r} is missing.")
        return value


def agreed(values: Mapping[str, Any]) -> Any:
    """The value that several places in config.json give; None if there are none.

    Raises:
      ConfigError: they differ. Programs disagree about which place counts.
    """
    found = list(values.values())
    if any(value != found[0] for value in found):
        listed = ", ".join(f"{place}={value!r}" for place, value in values.items())
        raise ConfigError("config.json", f"{listed}: these mean the same, but differ. Keep the one that is right.")
    return found[0] if found else None
