"""A request in the engine, and the events that its owner gets."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Literal

import numpy as np

from jax_mla_cp.batch import Sampling
from jax_mla_cp.engine.text import TextStream


@dataclasses.dataclass(frozen=True)
class Token:
    """A sampled token, with the text that it completed."""

    token: int
    text: str
    logprob: float
    top_tokens: np.ndarray
    top_logprobs: np.ndarray


@dataclasses.dataclass(frozen=True)
class Finished:
    """The end. `text` is what was held back for a stop string or a code point that never came."""

    reason: Literal["stop", "length"]
    text: str


@dataclasses.dataclass(frozen=True)
class Failed:
    """The step that the request was part of failed; the message is fit for the client."""

    message: str


Event = Token | Finished | Failed


@dataclasses.dataclass(eq=False)
class Request:
    """What is asked for, and how far it has come. Only the engine's thread touches it once it is submitted.

    `emit` is called on that thread, with every event in order; it must not block.
    """

    prompt: list[int]
    max_tokens: int
    sampling: Sampling
    stop_tokens: frozenset[int]
    text: TextStream
    emit: Callable[[Event], None]
    # State.
    tokens: list[int] = dataclasses.field(default_factory=list)
    """The prompt and what has been sampled."""
    computed: int = 0
    """Tokens whose latents are in the pages."""
    drafts: list[int] = dataclasses.field(default_factory=list)
    """Guesses at the tokens that follow `tokens`, verified by the next step."""
    pages: list[int] = dataclasses.field(default_factory=list)
    group: int = -1

    def __post_init__(self) -> None:
        self.tokens = list(self.prompt)

    @property
    def left(self) -> int:
        """Tokens that may still be sampled."""
        return len(self.prompt) + self.max_tokens - len(self.tokens)

    @property
    def reserved(self) -> int:
        """Tokens that need a place in the cache: all but the last one sampled."""
        return len(self.prompt) + self.max_tokens - 1

    def append(self, token: Token, reason: Literal["stop", "length"] | None) -> None:
        """Takes a sampled token and tells the owner, the end too if this is it."""
        self.tokens.append(token.token)
        self.emit(token)
        if reason:
            self.emit(Finished(reason, self.text.finish()))
