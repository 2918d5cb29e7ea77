"""A request in the engine, and the events that its owner gets."""

from __future__ import annotations

import dataclasses
import math
from array import array
from collections.abc import Callable, Iterator
from typing import Literal, Protocol

import numpy as np

from jax_mla_cp.batch.logit_bias import LogitBias
from jax_mla_cp.batch.step_request import SamplingParams
from jax_mla_cp.engine.logits_processor import LogitsProcessor
from jax_mla_cp.engine.text import TextStream
from jax_mla_cp.step.results import TokenLogprobs

FailedKind = Literal["step", "timeout", "queue_timeout", "grammar", "stopping", "dead", "internal"]


class GrammarError(ValueError):
    """A grammar that can't be followed; the message is fit for the client."""


class Grammar(Protocol):
    """What the output must follow, token by token. The state of one request.

    Raises:
      GrammarError: in `mask` and `accept`, it can be followed no further.
    """

    def mask(self) -> np.ndarray:
        """uint32 [ceil(V / 32)]: the bits, lowest first, of the tokens that may come next."""
        ...

    def accept(self, token: int) -> None:
        """A token has been sampled."""
        ...

    @property
    def finished(self) -> bool:
        """Nothing but the end may follow."""
        ...


@dataclasses.dataclass(frozen=True)
class Token:
    """A sampled token, with the text that it completed."""

    token: int
    text: str
    logprob: float
    top_tokens: np.ndarray
    top_logprobs: np.ndarray


@dataclasses.dataclass(frozen=True)
class PromptLogprobs:
    """The log-probability of each of the `P` prompt tokens, and the `k` most likely ones in its place.

    Nothing comes before the first token: its entries are NaN, and tokens 0.
    """

    logprobs: np.ndarray  # float32 [P]
    top_tokens: np.ndarray  # int32 [P, k]
    top_logprobs: np.ndarray  # float32 [P, k]


@dataclasses.dataclass(frozen=True)
class Finished:
    """The end. `text` is what was held back for a stop string or a code point that never came."""

    reason: Literal["stop", "length"]
    text: str
    cached_tokens: int = 0
    """Prompt tokens that were not computed, because pages of other requests had them."""
    stop: int | str | None = None
    """The end token or stop string that came; None if `max_tokens` or the grammar ended it."""


@dataclasses.dataclass(frozen=True)
class Failed:
    """The request got no further; the message is fit for the client.

    `kind`: "step", a step that it was part of failed; "timeout" and "queue_timeout", its own limits; "grammar", its
    grammar could be followed no further; "stopping" and "dead",
    the engine takes and finishes nothing more; "internal", something went wrong with this request alone.
    """

    message: str
    kind: FailedKind = "internal"


Event = Token | PromptLogprobs | Finished | Failed


@dataclasses.dataclass(eq=False)
class Request:
    """What is asked for, and how far it has come. Only the engine's thread touches it once it is submitted.

    Raises:
      ValueError: no prompt, or numbers of tokens that can't be.
    """

    prompt: list[int]
    max_tokens: int
    """May be 0 with `prompt_logprobs`."""
    sampling: SamplingParams
    stop_tokens: frozenset[int]
    text: TextStream
    emit: Callable[[Event], None]
    """Called on the engine's thread, with every event in order; it must not block."""
    _: dataclasses.KW_ONLY
    id: str = ""
    min_tokens: int = 0
    """Before so many are sampled, no end token is, and no stop string is looked for."""
    logits_processor: LogitsProcessor | None = None
    """Must know the end tokens if there are `min_tokens`; None: made if it is needed."""
    grammar: Grammar | None = None
    prompt_logprobs: bool = False
    """Sends `PromptLogprobs` before the first token. Takes no pages of other requests: every token has to run."""
    cache_salt: str = ""
    """Only requests with the same one share pages."""
    queue_timeout: float | None = None
    """Seconds until it must have started."""
    timeout: float | None = None
    """Seconds until it must be finished."""

    # State.
    tokens: list[int] = dataclasses.field(init=False)
    """The prompt and what has been sampled."""
    computed: int = dataclasses.field(default=0, init=False)
    """Tokens whose latents are in the pages."""
    drafts: list[int] = dataclasses.field(default_factory=list, init=False)
    """Guesses at the tokens that follow `tokens`, verified by the next step."""
    pages: array[int] = dataclasses.field(default_factory=lambda: array("i"), init=False)
    named: int = dataclasses.field(default=0, init=False)
    """Pages, from the first one on, that other requests may use too."""
    names: list[bytes] = dataclasses.field(default_factory=list, init=False)
    """Of the request's first pages, as far as they have been needed (`prefix.Names`)."""
    group: int | None = dataclasses.field(default=None, init=False)
    """The dp group that it runs in; None: it waits, or is not in the engine."""
    arrival: int = dataclasses.field(default=-1, init=False)
    """Its place among all requests."""
    preempted: bool = dataclasses.field(default=False, init=False)
    cached_tokens: int = dataclasses.field(default=0, init=False)
    scoring: bool = dataclasses.field(init=False)
    """The prompt's scores are still to come."""
    scores: list[TokenLogprobs] = dataclasses.field(default_factory=list, init=False)
    """Those of the prompt's first `computed` tokens, chunk by chunk, while `scoring`."""
    # When it happened, in seconds of `time.monotonic`.
    arrived: float = dataclasses.field(default=math.nan, init=False)
    started: float | None = dataclasses.field(default=None, init=False)
    first_token: float | None = dataclasses.field(default=None, init=False)
    last_token: float | None = dataclasses.field(default=None, init=False)

    def __post_init__(self) -> None:
        least = 0 if self.prompt_logprobs else 1
        if not self.prompt:
            raise ValueError("prompt: must have at least one token.")
        if self.max_tokens < least:
            raise ValueError(f"max_tokens: must be at least {least}, got {self.max_tokens}.")
        if not 0 <= self.min_tokens <= self.max_tokens:
            raise ValueError(f"min_tokens: must be 0 to max_tokens={self.max_tokens}, got {self.min_tokens}.")
        self.tokens = list(self.prompt)
        self.scoring = self.prompt_logprobs
        if self.logits_processor is None and (self.min_tokens or self.grammar is not None):
            self.logits_processor = LogitsProcessor(self.prompt, banned=tuple(self.stop_tokens))

    @property
    def sampled(self) -> int:
        return len(self.tokens) - len(self.prompt)

    @property
    def left(self) -> int:
        """Tokens that may still be sampled."""
        return self.max_tokens - self.sampled

    @property
    def pending(self) -> int:
        """Known tokens whose latents are not in the pages."""
        return len(self.tokens) - self.computed

    @property
    def decoding(self) -> bool:
        """Nothing but the last sampled token is to be computed."""
        return self.pending == 1 and self.computed >= len(self.prompt)

    @property
    def longest(self) -> int:
        """Tokens that may need a place in the cache: all but the last one sampled."""
        return len(self.prompt) + max(self.max_tokens, 1) - 1

    @property
    def may_end(self) -> bool:
        """Whether an end token or a stop string ends it now."""
        return self.sampled >= self.min_tokens

    def logit_bias(self) -> LogitBias | None:
        """What is done to the logits of the next token."""
        if self.logits_processor is None:
            return None
        return self.logits_processor.bias(not self.may_end, None if self.grammar is None else self.grammar.mask())

    def deadlines(self) -> Iterator[tuple[float, FailedKind, str]]:
        """The limits that still hold: until when, and what it fails with then."""
        if self.queue_timeout is not None and self.started is None:
            message = f"The request did not start within {self.queue_timeout:g} s: the server is busy."
            yield self.arrived + self.queue_timeout, "queue_timeout", message
        if self.timeout is not None:
            yield self.arrived + self.timeout, "timeout", f"The request was not finished within {self.timeout:g} s."
