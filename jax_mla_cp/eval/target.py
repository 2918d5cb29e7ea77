"""What is evaluated: a model in this process, or a server."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

from jax_mla_cp.eval.prompts import Prompt


class TargetError(RuntimeError):
    """The model or the server failed, or answered what can't be understood; the message is for the user."""


class CannotScore(TargetError):
    """The target answers prompts, but gives no log-probabilities of a prompt's own tokens."""


class Target(Protocol):
    """Both methods take a while, and report what is done."""

    def facts(self) -> dict[str, Any]:
        """What the JSON file says of it: at least `model`, `device`, `mesh` and `versions`."""
        ...

    def answer(self, prompts: Sequence[Prompt], max_tokens: int, done: Callable[[int, int, str], None]) -> None:
        """Continues all prompts greedily; `done(index, prompt tokens, text)` is called as each is finished.

        Raises:
          TargetError: one could not be answered.
        """
        ...

    def logprobs(self, windows: Sequence[Sequence[int]], done: Callable[[], None]) -> list[float]:
        """The log-probability of every token of the windows that has one before it; `done()` after each window.

        Raises:
          TargetError: they can't be had; `CannotScore` if that is no fault.
        """
        ...
