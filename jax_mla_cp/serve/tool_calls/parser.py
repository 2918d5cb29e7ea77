"""`ToolCallParser`: a model's text -> content and calls, as the text comes."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable, Sequence
from typing import Protocol

from jax_mla_cp.serve.tool_calls.parsed import CallDelta, Parsed
from jax_mla_cp.serve.tool_calls.pattern import Match, Partial, Pattern, beginnings, first_match


@dataclasses.dataclass(frozen=True)
class Read:
    """Attributes:
    arguments: the next part of the arguments' JSON text.
    at: where reading goes on; the text from there on has to be shown again, with more behind it.
    ended: the call has ended.
    """

    arguments: str
    at: int
    ended: bool


class Arguments(Protocol):
    """The arguments of one call, read until the call ends."""

    def read(self, text: str, at: int) -> Read: ...

    @property
    def is_complete(self) -> bool:
        """True if the call is usable though its end marker is missing."""


@dataclasses.dataclass(frozen=True)
class Boundaries:
    """The marks at which calls begin.

    Attributes:
      call: from a marker to the place where the arguments begin; the field `name`, and for formats that have it `number`.
      empty: a section without calls.
      section_end: ends a section, after calls.
    """

    call: Sequence[Pattern]
    empty: Sequence[Pattern] = ()
    section_end: Sequence[Pattern] = ()

    @functools.cached_property
    def beginnings(self) -> re.Pattern[str]:
        return beginnings([*self.call, *self.empty, *self.section_end])


class ToolCallParser:
    """Divides one output's streamed text. Text that does not become a call is content, markers included.

    Content is verbatim, except that a stretch of white space alone beside a call is dropped, as in vLLM. Names are not compared
    with the tools: a client can answer a call of an unknown tool, and the model corrects itself.

    Args:
      new_arguments: makes the reader of a call's arguments from the name of its function.
      call_id: a call's id, from its name and the number that the model wrote, or else its index.
    """

    def __init__(
        self, boundaries: Boundaries, new_arguments: Callable[[str], Arguments], call_id: Callable[[str, int], str]
    ):
        self._boundaries = boundaries
        self._new_arguments = new_arguments
        self._call_id = call_id
        self._rest = ""
        """Text that may still become a marker; at most `pattern.MAX_LENGTH` characters."""
        self._arguments: Arguments | None = None
        """The reader of the call that has begun; None: outside of calls."""
        self._in_section = False
        self._count = 0
        self._blank: list[str] | None = []
        """White space since the last call; None: other text has followed."""
        self._content: list[str] = []
        self._calls: list[CallDelta] = []

    @property
    def is_incomplete(self) -> bool:
        """True if the text has ended within a call."""
        return self._arguments is not None and not self._arguments.is_complete

    def push(self, text: str) -> Parsed:
        """Adds text and returns what is certain by now."""
        text, at = self._rest + text, 0
        while at < len(text):
            before = at
            if self._arguments is None:
                at = self._read_text(text, at)
                if at == before:
                    break
            else:
                at = self._read_arguments(text, at, self._arguments)
                if self._arguments is not None:
                    break
        self._rest = text[at:]
        return self._take()

    def finish(self) -> Parsed:
        """Ends the text. A call that it cuts keeps the arguments that have come, and `is_incomplete` tells so."""
        if self._arguments is None:
            self._add_content(self._rest)
            if self._count == 0:
                self._content += self._blank or ()
        self._rest = ""
        return self._take()

    def _take(self) -> Parsed:
        parsed = Parsed("".join(self._content), self._calls)
        self._content, self._calls = [], []
        return parsed

    def _read_text(self, text: str, at: int) -> int:
        beginning = self._boundaries.beginnings.search(text, at)
        start = len(text) if beginning is None else beginning.start()
        if start > at:
            self._add_content(text[at:start])
            return start
        call = first_match(self._boundaries.call, text, at)
        if isinstance(call, Match):
            self._begin_call(call)
            return call.end
        ends = self._boundaries.section_end if self._in_section else ()
        other = first_match((*ends, *self._boundaries.empty), text, at)
        if isinstance(other, Match):
            self._in_section, self._blank = False, []
            return other.end
        if isinstance(call, Partial) or isinstance(other, Partial):
            return at
        self._add_content(text[at])
        return at + 1

    def _begin_call(self, call: Match) -> None:
        name, number = call.fields["name"], call.fields.get("number")
        call_id = self._call_id(name, self._count if number is None else int(number))
        self._calls.append(CallDelta(self._count, call_id, name, ""))
        self._arguments = self._new_arguments(name)
        self._in_section, self._blank = True, []

    def _read_arguments(self, text: str, at: int, arguments: Arguments) -> int:
        read = arguments.read(text, at)
        if read.arguments:
            self._calls.append(CallDelta(self._count, None, None, read.arguments))
        if read.ended:
            self._arguments = None
            self._count += 1
        return read.at

    def _add_content(self, text: str) -> None:
        if self._blank is not None:
            self._blank.append(text)
            if not text or text.isspace():
                return
            text, self._blank = "".join(self._blank), None
        self._content.append(text)
