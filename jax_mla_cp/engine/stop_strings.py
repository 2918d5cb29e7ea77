"""Aho-Corasick automaton: the first of many stop strings in a text that arrives in pieces."""

from __future__ import annotations

from array import array
from bisect import bisect_right
from collections.abc import Sequence

START = 0
"""The state before any text."""

_NO_CHAR = 0x110000  # one more than the largest code point


class StopStrings:
    """The automaton of a set of stop strings (Aho and Corasick, "Efficient string matching", 1975).

    A state is an int that stands for a text: the longest end of what was read that begins a stop string. The caller keeps the
    state, so that the choices of a request can share the automaton. A character costs as much with many stop strings as with
    one, on average over a text.

    Failures are computed for the states that a text reaches. 64 stop strings of 1024 characters are therefore built within
    milliseconds. The computation nests at most as deep as there are stop strings.
    """

    def __init__(self, stops: Sequence[str]):
        """
        Args:
          stops: at least one character each.

        Raises:
          ValueError: a stop string is empty.
        """
        if "" in stops:
            raise ValueError("stop: a stop string must have at least one character, got ''. Leave it out.")
        # The states of a stop string have consecutive numbers, from where it leaves the stop strings before it: a run. Code
        # points in an array, and little else by state, so that the longest stop strings take less than a megabyte.
        self._chars = array("I", [_NO_CHAR])  # by state, its text's last code point; _NO_CHAR also after each run
        self._starts: list[int] = []  # each run's first state
        self._lengths: dict[int, int] = {}  # by start: the length of its text
        self._parents: dict[int, int] = {}  # by start: the state whose text is a character shorter
        self._first: dict[str, int] = {}  # the states after START
        self._branches: dict[tuple[int, str], int] = {}  # the states after others, unless they have the next number
        self._matches = {START: ""}  # by state, the stop string that ends there, "" if none; as far as it is known
        self._build(stops)
        self._failures = dict.fromkeys(self._first.values(), START)  # likewise

    def scan(self, state: int, text: str) -> tuple[int, int, str | None]:
        """Reads a text up to the end of the first match, which may have begun before this text.

        Returns:
          The new state; the number of characters read; and the stop string that ends there, the longest if there are several.
          None if there is no match, and all of the text was read.
        """
        first, matches, step = self._first, self._matches, self._step
        if not state and first.keys().isdisjoint(text):
            return START, len(text), None
        for read, char in enumerate(text, 1):
            state = step(state, char) if state else first.get(char, START)
            if state:
                stop = matches.get(state)
                if stop is None:
                    stop = self._match(state)
                if stop:
                    return state, read, stop
        return state, len(text), None

    def pending(self, state: int) -> int:
        """Returns how many characters at the end of the text may begin a stop string."""
        if not state:
            return 0
        start = self._starts[bisect_right(self._starts, state) - 1]
        return self._lengths[start] + state - start

    def _build(self, stops: Sequence[str]) -> None:
        latest, path = "", list[int]()  # the stop string added last, and the starts of the runs that it follows
        for stop in sorted(stops):
            if latest and stop.startswith(latest):
                continue  # it can't be found before the one that it begins with
            shared = next((i for i, (a, b) in enumerate(zip(latest, stop, strict=False)) if a != b), 0)
            while path and self._lengths[path[-1]] > shared:
                path.pop()
            parent = path[-1] + shared - self._lengths[path[-1]] if path else START
            start = len(self._chars)
            if parent:
                self._branches[parent, stop[shared]] = start
            else:
                self._first[stop[shared]] = start
            self._starts.append(start)
            self._lengths[start] = shared + 1
            self._parents[start] = parent
            self._chars.extend(map(ord, stop[shared:]))
            self._matches[len(self._chars) - 1] = stop
            self._chars.append(_NO_CHAR)
            path.append(start)
            latest = stop

    def _child(self, state: int, char: str) -> int:
        """The state whose text is one character longer, 0 if there is none. Not for START."""
        return state + 1 if self._chars[state + 1] == ord(char) else self._branches.get((state, char), 0)

    def _step(self, state: int, char: str) -> int:
        """The state after a character."""
        while state:
            if after := self._child(state, char):
                return after
            state = self._failure(state)
        return self._first.get(char, START)

    def _failure(self, state: int) -> int:
        """The state of the longest proper end of a state's text that has one."""
        path = []
        while (failure := self._failures.get(state)) is None:
            path.append(state)
            state = self._parents.get(state, state - 1)
        for state in reversed(path):
            failure = self._failures[state] = self._step(failure, chr(self._chars[state]))
        return failure

    def _match(self, state: int) -> str:
        """The longest stop string that ends in a state, "" if none does."""
        path = []
        while (stop := self._matches.get(state)) is None:
            path.append(state)
            state = self._failure(state)
        self._matches.update(dict.fromkeys(path, stop))
        return stop
