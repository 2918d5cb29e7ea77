"""A request's part of a step: scheduled, then prepared for the runner."""

from __future__ import annotations

import dataclasses

from jax_mla_cp.batch.step_request import StepRequest, last_sampled
from jax_mla_cp.engine.request import Request


@dataclasses.dataclass
class ScheduledRequest:
    """A request's next `num_tokens` tokens, and its drafts if a token is sampled after them."""

    request: Request
    num_tokens: int

    @property
    def needs_sampling(self) -> bool:
        """True if the step samples a token: these are the last known tokens, and more may be sampled."""
        r = self.request
        return self.num_tokens == r.num_uncomputed_tokens and r.num_remaining_tokens > 0

    def prepare(self) -> PreparedRequest:
        """Makes the runner's input.

        Raises:
          GrammarError: the request's grammar can't be followed any further.
        """
        return PreparedRequest(self.request, self._step_request(), len(self.request.tokens))

    def _step_request(self) -> StepRequest:
        r = self.request
        end = r.num_computed_tokens + self.num_tokens
        tokens = r.tokens[r.num_computed_tokens : end]
        if not self.needs_sampling:
            following = r.tokens[end] if end < len(r.tokens) else None
            return StepRequest(
                tokens,
                r.num_computed_tokens,
                r.pages,
                next_token=following,
                prompt_logprobs=r.needs_prompt_logprobs,
                slot=r.slot,
            )
        return StepRequest(
            tokens + r.drafts,
            r.num_computed_tokens,
            r.pages,
            r.sampling,
            drafts=len(r.drafts),
            logit_bias=r.logit_bias(),
            prompt_logprobs=r.needs_prompt_logprobs,
            slot=r.slot,
        )


@dataclasses.dataclass(frozen=True)
class PreparedRequest:
    """A request's part of a step, as the runner gets it."""

    request: Request
    step_request: StepRequest
    num_tokens: int
    """Tokens that the request has before the step, pending ones too."""

    @property
    def start(self) -> int:
        """The position of the step's first token."""
        return self.step_request.num_computed_tokens

    @property
    def end(self) -> int:
        """The position after the step's tokens, drafts aside: that of the token that it samples."""
        return self.start + len(self.step_request.tokens) - self.step_request.drafts

    @property
    def samples(self) -> bool:
        return self.step_request.sampling is not None

    @property
    def is_prefill(self) -> bool:
        """True unless the request is decoding: its last token alone is left to compute."""
        return self.start < max(len(self.request.prompt), self.num_tokens - 1)

    @property
    def is_current(self) -> bool:
        """True unless the request has been preempted since: it has other pages then."""
        return self.request.pages is self.step_request.pages

    def advance(self) -> None:
        """Moves the request past the step, which has been dispatched."""
        self.request.num_computed_tokens = self.end
        if self.samples:
            self.request.tokens.append(last_sampled(self.request.slot))
            self.request.num_pending_tokens += 1
