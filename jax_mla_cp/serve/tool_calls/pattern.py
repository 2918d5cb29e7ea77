"""`Pattern`: a sequence of markers and words, matched against text whose end may not have come yet."""

from __future__ import annotations

import dataclasses
import enum
import re
from collections.abc import Iterable, Mapping

MAX_LENGTH = 512
"""Characters that a match may span. So a text that might become a call is held back no longer, and matched at a bounded cost."""

NAME = r"(?P<name>[\w.-]+)"
"""A function's name, whether it is that of a tool or not."""

WHITE_SPACE = " \t\r\n"
_GAP = re.compile(rf"[{WHITE_SPACE}]*")
_WORD = re.compile(r"[^\s<>`]{0,256}")


@dataclasses.dataclass(frozen=True)
class Word:
    """A word without white space, angle brackets and backticks. The groups of `form` become the match's fields."""

    form: re.Pattern[str]


@dataclasses.dataclass(frozen=True)
class Match:
    end: int
    """Index of the text behind the match."""
    fields: Mapping[str, str]


class Partial(enum.Enum):
    """The text matches as far as it goes."""

    PARTIAL = enum.auto()


PARTIAL = Partial.PARTIAL


class Pattern:
    """Steps with any white space between them.

    Args:
      first: a literal text.
      steps: literal texts and words.
      ahead: the last step has to follow, but the match ends before it.
    """

    def __init__(self, first: str, *steps: str | Word, ahead: bool = False):
        self._steps = (first, *steps)
        self._ahead = ahead

    @property
    def beginning(self) -> str:
        """A regular expression of the first step and of one character behind it, each as far as the text goes."""
        first, *rest = self._steps
        assert isinstance(first, str)
        expression = rf"{_GAP.pattern}(?:\Z|{re.escape(rest[0][0])})" if rest and isinstance(rest[0], str) else ""
        for i, character in enumerate(reversed(first)):
            expression = re.escape(character) + (rf"(?:\Z|{expression})" if i else expression)
        return expression

    def match(self, text: str, at: int) -> Match | Partial | None:
        """Matches at a position. None: no text that begins like this can match.

        The verdict on a text is also that on every text that begins with it, unless it is PARTIAL: so the cuts of a stream make
        no difference.
        """
        found = self._match(text, at)
        longest = (found.end if isinstance(found, Match) else len(text)) - at
        return None if longest > MAX_LENGTH else found

    def _match(self, text: str, at: int) -> Match | Partial | None:
        fields: dict[str, str] = {}
        here = before = at
        for step in self._steps:
            before = here
            if here > at:
                here = _end(_GAP, text, here)
            if isinstance(step, Word):
                end = _end(_WORD, text, here)
                if end == len(text):
                    return PARTIAL
                word = step.form.fullmatch(text, here, end)
                if word is None:
                    return None
                fields.update(word.groupdict())
                here = end
            elif text.startswith(step, here):
                here += len(step)
            elif len(text) - here < len(step) and step.startswith(text[here:]):
                return PARTIAL
            else:
                return None
        return Match(before if self._ahead else here, fields)


def beginnings(patterns: Iterable[Pattern], *others: str) -> re.Pattern[str]:
    """Finds where a pattern may begin, so that most texts cost no attempt to match; and other expressions."""
    return re.compile("|".join(dict.fromkeys([*others, *(pattern.beginning for pattern in patterns)])))


def first_match(patterns: Iterable[Pattern], text: str, at: int) -> Match | Partial | None:
    """The first pattern's match; PARTIAL if there is none yet."""
    verdict: Partial | None = None
    for pattern in patterns:
        found = pattern.match(text, at)
        if isinstance(found, Match):
            return found
        verdict = verdict or found
    return verdict


def _end(pattern: re.Pattern[str], text: str, at: int) -> int:
    found = pattern.match(text, at)
    assert found is not None  # both match the empty text
    return found.end()
