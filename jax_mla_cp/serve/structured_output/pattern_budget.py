"""Limits on regular expressions and `multipleOf`, which llguidance's own limits don't bound: it takes time that grows with the cube
of a pattern's length, and memory that grows with a multiple."""

from __future__ import annotations

import math
from decimal import Decimal

from jax_mla_cp.engine import GrammarError

MAX_PATTERN = 2048
"""Characters of a regular expression, or pieces of a Lark terminal together with the terminals that it refers to."""
_MAX_STATES = 10_000
"""States of the automaton of all `multipleOf` together."""
MAX_INTERSECTED = 8
"""Patterns that one text has to match at once. The time doubles with each."""


class PatternBudget:
    """Sums up what the automata of one schema or grammar cost: those of regular expressions and of `multipleOf`."""

    def __init__(self) -> None:
        self._left = MAX_PATTERN**2
        self._multiples: set[int] = set()

    def spend(self, length: int, *, of: str = "a pattern") -> None:
        """Counts a regular expression.

        Args:
          of: its name in the error.

        Raises:
          GrammarError: it is too long, or all are together.
        """
        if length > MAX_PATTERN:
            raise GrammarError(f"{of} is more than {MAX_PATTERN} characters long. Shorten it.")
        self._left -= length**2
        if self._left < 0:
            raise GrammarError(
                f"the patterns or terminals are too long together: their squared lengths may add up to {MAX_PATTERN}**2. Shorten them, or "
                "use fewer."
            )

    def multiple_of(self, value: float) -> None:
        """Counts a `multipleOf`, whose automaton has as many states as the number without its decimal point.

        Raises:
          GrammarError: it exceeds the budget, with the others of the request.
        """
        number = Decimal(str(min(value, _MAX_STATES + 1))).normalize()
        places = max(0, -int(number.as_tuple().exponent))
        self._multiples.add(int(number.scaleb(places)))
        if math.prod(self._multiples) > _MAX_STATES:
            raise GrammarError(
                f"multipleOf: the different values, without decimal points, multiply to more than {_MAX_STATES}. Leave some "
                "out and check the answer yourself."
            )
