"""`Backend`: what the evaluation runs on, a model in this process or a server."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

from jax_mla_cp.eval.corpus import PasskeyPrompt


class BackendError(RuntimeError):
    """The model or the server failed, or gave an answer that can't be understood. The message is for the user."""


class PromptLogprobsUnsupported(BackendError):
    """The backend generates, but gives no log-probabilities of prompt tokens."""


class Backend(Protocol):
    """Generates from prompts and scores token windows. Both take a while, and report their progress."""

    def metadata(self) -> dict[str, Any]:
        """Entries for the JSON file: at least `model`, `device`, `mesh` and `versions`."""
        ...

    def generate(
        self, prompts: Sequence[PasskeyPrompt], max_tokens: int, on_done: Callable[[int, int, str], None]
    ) -> None:
        """Continues all prompts greedily.

        Args:
          on_done: called as each prompt is finished, with its index, its number of tokens and the text generated.

        Raises:
          BackendError: a request failed.
        """
        ...

    def prompt_logprobs(self, windows: Sequence[Sequence[int]], on_done: Callable[[], None]) -> list[float]:
        """Log-probabilities of all tokens of the windows but each window's first.

        Args:
          on_done: called after each window.

        Raises:
          BackendError: a request failed; `PromptLogprobsUnsupported` if the backend has none to give.
        """
        ...
