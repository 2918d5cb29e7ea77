"""Applies the result of a step to a request: tokens, text, drafts, the end."""

from __future__ import annotations

import numpy as np

from jax_mla_cp.engine.request import Event, Finished, PromptLogprobs, Request, Token
from jax_mla_cp.engine.scheduled_request import PreparedRequest
from jax_mla_cp.step.results import SampledToken, StepResult


def process_output(part: PreparedRequest, result: StepResult) -> list[Event]:
    """Updates a request from its step's result. Further steps with the request may be in flight.

    Returns:
      The events for its owner, in order. `Finished` is the last one if the request has ended.

    Raises:
      GrammarError: the request's grammar does not accept a sampled token.
    """
    request, end = part.request, part.end
    events: list[Event] = []
    if request.needs_prompt_logprobs:
        assert result.prompt_logprobs is not None
        request.prompt_logprobs_chunks.append(result.prompt_logprobs)
        if end == len(request.prompt):
            events.append(_prompt_logprobs(request))
            request.needs_prompt_logprobs, request.prompt_logprobs_chunks = False, []
    if not part.samples:
        _verify(part, end)
        if end == len(request.prompt) and not request.max_tokens:
            events.append(Finished("length", "", request.cached_tokens))
        return events
    finished = None
    for position, sampled in enumerate(result.sampled, end):
        token, finished = _take(request, position, sampled)
        events.append(token)
        if finished:
            events.append(finished)
            break  # accepted drafts after the end are dropped
    # Accepted drafts are computed; the token sampled after them is not.
    request.num_computed_tokens += position - end
    _verify(part, position)
    # A logits processor needs all tokens before the one it biases: its request runs without drafts.
    drop = finished or request.logits_processor
    request.drafts = [] if drop else result.drafts[: max(request.num_remaining_tokens - 1, 0)]
    return events


def _verify(part: PreparedRequest, num_tokens: int) -> None:
    """Notes that the request's pages have so many tokens' latents."""
    if part.is_current:
        part.request.num_verified_tokens = num_tokens


def _take(request: Request, position: int, sampled: SampledToken) -> tuple[Token, Finished | None]:
    """Appends a sampled token to the known ones."""
    assert position == request.num_known_tokens
    may_stop = position - len(request.prompt) >= request.min_tokens
    is_stop_token = may_stop and sampled.token in request.stop_tokens
    request.add_known_token(sampled.token)
    if request.logits_processor:
        request.logits_processor.push(sampled.token)
    if request.grammar and not is_stop_token:
        request.grammar.accept(sampled.token)
    # As in vLLM, a stop token's text belongs to the output with `include_stop` only, even if special tokens are shown.
    omit = is_stop_token and not request.text.include_stop
    offset = request.text.num_characters
    text = "" if omit else request.text.push(sampled.token, may_stop=may_stop)
    token = Token(sampled.token, text, sampled.logprob, sampled.top_tokens, sampled.top_logprobs, offset)
    stop: int | str | None = request.text.stopped_by
    if stop is None and is_stop_token:
        stop = sampled.token
    if stop is not None or (request.grammar and request.grammar.finished):
        return token, Finished("stop", request.text.finish(), request.cached_tokens, stop)
    if request.num_known_tokens == len(request.prompt) + request.max_tokens:
        return token, Finished("length", request.text.finish(), request.cached_tokens)
    return token, None


def _prompt_logprobs(request: Request) -> PromptLogprobs:
    """Joins the chunks and shifts them by one: a step scores the token after each, a client wants each token's own."""

    def shifted(parts: list[np.ndarray], first: float) -> np.ndarray:
        values = np.concatenate(parts)[: len(request.prompt) - 1]
        return np.concatenate([np.full((1, *values.shape[1:]), first, values.dtype), values])

    chunks = request.prompt_logprobs_chunks
    return PromptLogprobs(
        shifted([chunk.logprobs for chunk in chunks], np.nan),
        shifted([chunk.top_tokens for chunk in chunks], 0),
        shifted([chunk.top_logprobs for chunk in chunks], np.nan),
    )
