"""Requests, and the events that the engine sends to their owners."""

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
    """The output can't follow its grammar. The message is for the client."""


class Grammar(Protocol):
    """Constrains one request's output, token by token.

    Raises:
      GrammarError: by `mask` and `accept`, if the grammar can't be followed any further.
    """

    def mask(self) -> np.ndarray | None:
        """uint32 [ceil(V / 32)]: a bit per token, lowest first; set if the token may come next. None: any token may."""
        ...

    def accept(self, token: int) -> None:
        """Advances by a sampled token."""
        ...

    @property
    def finished(self) -> bool:
        """True if only the end may follow."""
        ...


@dataclasses.dataclass(frozen=True)
class Token:
    """A sampled token, and the text that it completes."""

    token: int
    text: str
    logprob: float
    top_tokens: np.ndarray
    top_logprobs: np.ndarray
    text_offset: int = 0
    """Characters of the output before the token's own text. It does not depend on when text is delivered: the token's text may be
    held back, or be complete only with a later token. A stop string that is cut off counts, so the offset may be beyond the end
    of the final text. A token without text has the offset at which the next text begins."""


@dataclasses.dataclass(frozen=True)
class PromptLogprobs:
    """Log-probabilities of the `P` prompt tokens, and the `k` most likely tokens at each position.

    The first token is predicted by nothing: its log-probabilities are NaN, its top tokens 0.
    """

    logprobs: np.ndarray  # float32 [P]
    top_tokens: np.ndarray  # int32 [P, k]
    top_logprobs: np.ndarray  # float32 [P, k]


@dataclasses.dataclass(frozen=True)
class Finished:
    """The end of a request that succeeded."""

    reason: Literal["stop", "length"]
    text: str
    """Text held back until now: it might have begun a stop string, or a code point was incomplete."""
    cached_tokens: int = 0
    """Prompt tokens found in the prefix cache."""
    stop: int | str | None = None
    """The stop token or stop string; None if `max_tokens` or the grammar ended the output."""


@dataclasses.dataclass(frozen=True)
class Failed:
    """The end of a request that failed. The message is for the client."""

    message: str
    kind: FailedKind = "internal"
    """"step": a step with this request failed. "timeout", "queue_timeout": a deadline of the request passed. "grammar": its
    grammar can't be followed any further. "stopping", "dead": the engine has stopped. "internal": an error that concerns
    this request alone."""


Event = Token | PromptLogprobs | Finished | Failed


@dataclasses.dataclass(eq=False)
class Request:
    """A request and its state. Once it is submitted, only the engine's thread may touch it.

    Raises:
      ValueError: the prompt is empty, or `max_tokens` or `min_tokens` is out of range.
    """

    prompt: list[int]
    max_tokens: int
    """At least 1; 0 is allowed with `prompt_logprobs`."""
    sampling: SamplingParams
    stop_tokens: frozenset[int]
    text: TextStream
    emit: Callable[[Event], None]
    """Called on the engine's thread with every event, in order. It must not block."""
    _: dataclasses.KW_ONLY
    id: str = ""
    min_tokens: int = 0
    """Number of tokens before which stop tokens are banned and stop strings ignored."""
    logits_processor: LogitsProcessor | None = None
    """With `min_tokens`, it must ban the stop tokens. None: created if `min_tokens` or `grammar` need one."""
    grammar: Grammar | None = None
    prompt_logprobs: bool = False
    """Sends `PromptLogprobs` before the first token. The whole prompt is computed: cached pages are not used."""
    cache_salt: str = ""
    """Requests share cached pages only if they have the same salt."""
    queue_timeout: float | None = None
    """Seconds from submission within which the request must start."""
    timeout: float | None = None
    """Seconds from arrival within which the request must finish."""
    arrival_time: float = math.nan
    """`time.monotonic()` when the client's request arrived. Default: when it is submitted."""

    # State.
    tokens: list[int] = dataclasses.field(init=False)
    """The prompt and the sampled tokens. The last `num_pending_tokens` are `last_sampled(slot)`."""
    num_pending_tokens: int = dataclasses.field(default=0, init=False)
    """Sampled tokens that steps in flight will give."""
    num_computed_tokens: int = dataclasses.field(default=0, init=False)
    """Tokens whose latents are in the pages, or will be after the steps in flight."""
    num_verified_tokens: int = dataclasses.field(default=0, init=False)
    """Tokens whose latents are in the pages: steps that have succeeded computed them."""
    slot: int = dataclasses.field(default=-1, init=False)
    """While the request runs: the request slot in which the devices keep its last sampled token."""
    ended: bool = dataclasses.field(default=False, init=False)
    """True once the request has finished, failed or been aborted. Steps in flight may still compute it."""
    drafts: list[int] = dataclasses.field(default_factory=list, init=False)
    """Draft tokens that follow `tokens`, verified by the next step."""
    pages: array[int] = dataclasses.field(default_factory=lambda: array("i"), init=False)
    num_committed_pages: int = dataclasses.field(default=0, init=False)
    """Leading pages that other requests may share."""
    page_hashes: list[bytes] = dataclasses.field(default_factory=list, init=False)
    """Prefix hashes of the leading pages, as far as they have been needed."""
    group: int | None = dataclasses.field(default=None, init=False)
    """The dp group that the request runs in; None if it is waiting or not in the engine."""
    arrival_index: int = dataclasses.field(default=-1, init=False)
    """The request's place in the order of arrival."""
    preempted: bool = dataclasses.field(default=False, init=False)
    """True once the request has been preempted."""
    cached_tokens: int = dataclasses.field(default=0, init=False)
    """Prompt tokens found in the prefix cache at the first start."""
    needs_prompt_logprobs: bool = dataclasses.field(init=False)
    """True until `PromptLogprobs` is sent."""
    prompt_logprobs_chunks: list[TokenLogprobs] = dataclasses.field(default_factory=list, init=False)
    """While `needs_prompt_logprobs`: the scores of the first `num_computed_tokens` tokens, one item per chunk."""
    # Seconds of `time.monotonic`.
    submit_time: float = dataclasses.field(default=math.nan, init=False)
    start_time: float | None = dataclasses.field(default=None, init=False)
    first_token_time: float | None = dataclasses.field(default=None, init=False)
    last_token_time: float | None = dataclasses.field(default=None, init=False)

    def __post_init__(self) -> None:
        least = 0 if self.prompt_logprobs else 1
        if not self.prompt:
            raise ValueError("prompt: must have at least one token.")
        if self.max_tokens < least:
            raise ValueError(f"max_tokens: must be at least {least}, got {self.max_tokens}.")
        if not 0 <= self.min_tokens <= self.max_tokens:
            raise ValueError(f"min_tokens: must be 0 to max_tokens={self.max_tokens}, got {self.min_tokens}.")
        self.tokens = list(self.prompt)
        self.needs_prompt_logprobs = self.prompt_logprobs
        if self.logits_processor is None and (self.min_tokens or self.grammar is not None):
            self.logits_processor = LogitsProcessor(self.prompt, banned=tuple(self.stop_tokens))

    @property
    def num_output_tokens(self) -> int:
        """Sampled tokens, pending ones too."""
        return len(self.tokens) - len(self.prompt)

    @property
    def num_known_tokens(self) -> int:
        """Tokens of the prompt and the output that the host knows."""
        return len(self.tokens) - self.num_pending_tokens

    @property
    def num_remaining_tokens(self) -> int:
        """Tokens that may still be sampled."""
        return self.max_tokens - self.num_output_tokens

    @property
    def num_uncomputed_tokens(self) -> int:
        """Known tokens whose latents are not in the pages."""
        return len(self.tokens) - self.num_computed_tokens

    @property
    def is_decoding(self) -> bool:
        """True if only the last sampled token is left to compute."""
        return self.num_uncomputed_tokens == 1 and self.num_computed_tokens >= len(self.prompt)

    @property
    def max_slots(self) -> int:
        """Cache slots that the request needs at most. The last sampled token needs none."""
        return len(self.prompt) + max(self.max_tokens, 1) - 1

    @property
    def min_tokens_reached(self) -> bool:
        """True if a stop token or stop string may end the output with the next token to be sampled."""
        return self.num_output_tokens >= self.min_tokens

    @property
    def follows_output(self) -> bool:
        """True if the host must know every token before it can prepare the next one, or reads more than tokens from a step."""
        counts = self.logits_processor is not None and self.logits_processor.follows_output
        return counts or self.grammar is not None or self.needs_prompt_logprobs

    def add_known_token(self, token: int) -> None:
        """Adds a token that has been read: in the place of the first pending one, or at the end."""
        if self.num_pending_tokens:
            self.tokens[self.num_known_tokens] = token
            self.num_pending_tokens -= 1
        else:
            self.tokens.append(token)

    def drop_pending_tokens(self) -> None:
        """Forgets the tokens that steps in flight will give."""
        del self.tokens[self.num_known_tokens :]
        self.num_pending_tokens = 0

    def logit_bias(self) -> LogitBias | None:
        """The bias of the next token's logits."""
        if self.logits_processor is None:
            return None
        mask = None if self.grammar is None else self.grammar.mask()
        return self.logits_processor.bias(not self.min_tokens_reached, mask)

    def reset_computed(self) -> None:
        """Returns to the state of a waiting request: no pages, nothing computed. Sampled tokens stay."""
        self.pages, self.group = array("i"), None
        self.num_computed_tokens = self.num_verified_tokens = self.num_committed_pages = 0
        self.drafts, self.prompt_logprobs_chunks = [], []

    def deadlines(self) -> Iterator[tuple[float, FailedKind, str]]:
        """The deadlines that still apply: time, kind of failure, message for the client."""
        if self.queue_timeout is not None and self.start_time is None:
            message = f"The request did not start within {self.queue_timeout:g} s: the server is busy."
            yield self.submit_time + self.queue_timeout, "queue_timeout", message
        if self.timeout is not None:
            yield self.arrival_time + self.timeout, "timeout", f"The request did not finish within {self.timeout:g} s."
