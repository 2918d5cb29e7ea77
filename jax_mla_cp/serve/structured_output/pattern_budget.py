"""Limits on regular expressions. llguidance's own limits bound what repetitions cost, but not this: it takes time that grows
with the cube of a pattern's length, minutes for 40,000 characters of `.?`."""

from __future__ import annotations

from jax_mla_cp.engine import GrammarError

MAX_PATTERN = 2048
"""Characters of a regular expression, or pieces of a Lark terminal together with the terminals that it refers to."""
MAX_INTERSECTED = 8
"""Patterns that one text has to match at once. The time doubles with each."""


class PatternBudget:
    """Sums up the regular expressions of one schema or grammar."""

    def __init__(self) -> None:
        self._left = MAX_PATTERN**2

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
