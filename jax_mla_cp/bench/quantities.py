"""The benchmarks' sizes as the user types them: `8K`, `64x8K`, and lists of them."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

from jax_mla_cp.mesh import MeshShape

_K = 1024


def number(text: str) -> int:
    """Parses a whole number; the suffixes K and M stand for 1024 and 1024^2."""
    factor = {"k": _K, "m": _K * _K}.get(text[-1:].lower(), 1)
    digits = text if factor == 1 else text[:-1]
    if not (digits.isascii() and digits.isdigit()):
        raise argparse.ArgumentTypeError(f"must be whole numbers (K and M may follow), got {text!r}.")
    return int(digits) * factor


def listed(of: Callable[[str], Any], *, none: bool = False) -> Callable[[str], tuple[Any, ...]]:
    """A parser of comma-separated lists.

    Args:
      none: accept the word "none" for an empty list.
    """

    def parse(text: str) -> tuple[Any, ...]:
        return () if none and text == "none" else tuple(of(part) for part in text.split(","))

    return parse


def shape(text: str) -> tuple[int, int]:
    """Parses a number of requests and their context length."""
    requests, times, context = text.partition("x")
    if not times:
        raise argparse.ArgumentTypeError(f"must be REQUESTSxCONTEXT, e.g. 64x8K, got {text!r}.")
    return number(requests), number(context)


def as_flag(value: Any) -> str:
    """A default value as the user would type it; "" for flags and unset values."""
    if isinstance(value, bool) or value is None:
        return ""
    if isinstance(value, int):
        return next(
            (f"{value // size}{unit}" for size, unit in ((_K * _K, "M"), (_K, "K")) if value % size == 0), str(value)
        )
    if isinstance(value, tuple):
        if value and isinstance(value[0], tuple):
            return ",".join("x".join(map(as_flag, shape)) for shape in value)
        spaced = any(isinstance(part, MeshShape) or "," in str(part) for part in value)
        return (" " if spaced else ",").join(map(as_flag, value))
    return str(value)
