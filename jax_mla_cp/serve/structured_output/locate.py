"""Finds the part of a schema that a failure comes from, which llguidance does not say."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

from jax_mla_cp.serve.structured_output.schema_tree import Slot, subschemas

_SECONDS = 0.5


def locate(root: dict[str, Any], fails: Callable[[], bool]) -> str:
    """The JSON pointer of the smallest subschema that `root` fails for; of a larger one where that takes too long.

    Args:
      root: is changed.
      fails: tries `root` as it then is.
    """
    deadline = time.monotonic() + _SECONDS
    pointer, schema = "", root
    while isinstance(schema, dict):
        slots = list(subschemas(schema, definitions=True))
        parts = [container[key] for container, key, _ in slots]
        if not slots or _fails_with(0, slots, parts, fails):
            break
        low, high = 0, len(slots)  # it fails with `high`, not with `low`
        while high - low > 1:
            if time.monotonic() > deadline:
                return pointer
            middle = (low + high) // 2
            low, high = (low, middle) if _fails_with(middle, slots, parts, fails) else (middle, high)
        _fails_with(high, slots, parts, fails)
        pointer, schema = pointer + slots[low][2], parts[low]
    return pointer


def _fails_with(count: int, slots: Sequence[Slot], parts: Sequence[Any], fails: Callable[[], bool]) -> bool:
    """Tries the first `count` subschemas; the others allow anything."""
    for i, (container, key, _) in enumerate(slots):
        container[key] = parts[i] if i < count else True
    return fails()
