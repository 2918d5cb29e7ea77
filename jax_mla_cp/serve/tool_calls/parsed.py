"""`Parsed`: what a tool-call parser has found in a piece of text."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class CallDelta:
    """A part of a call. The first part has `id` and `name` and no arguments; later ones have arguments only.

    Attributes:
      index: position of the call in the output, from 0.
      arguments: the next part of the JSON text of the arguments.
    """

    index: int
    id: str | None
    name: str | None
    arguments: str


@dataclasses.dataclass(frozen=True)
class Parsed:
    """Content and parts of calls that are certain by now, in the order of the text within each."""

    content: str
    calls: list[CallDelta]
