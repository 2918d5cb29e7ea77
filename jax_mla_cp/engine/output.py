"""What a step's outcome makes of a request: its tokens, its text, and whether it has ended."""

from __future__ import annotations

import numpy as np

from jax_mla_cp.engine.group import Scheduled
from jax_mla_cp.engine.request import Event, Finished, PromptLogprobs, Request, Token
from jax_mla_cp.step.results import SampledToken, StepResult


def take(scheduled: Scheduled, outcome: StepResult) -> list[Event]:
    """Moves the request on.

    Returns:
      What its owner is to be told, in order; `Finished` is the last if the request has ended.
    """
    request, end = scheduled.request, scheduled.request.computed + scheduled.count
    events: list[Event] = []
    if request.scoring:
        assert outcome.scored is not None
        request.scores.append(outcome.scored)
        if end == len(request.prompt):
            events.append(_prompt_scored(request))
            request.scoring, request.scores = False, []
    if not scheduled.samples:
        request.computed = end
        if end == len(request.tokens):  # nothing was to be sampled at all
            events.append(Finished("length", "", request.cached_tokens))
        return events
    finished = None
    for sampled in outcome.sampled:
        token, finished = _append(request, sampled)
        events.append(token)
        if finished:
            events.append(finished)
            break  # what else was sampled follows the end
    # Drafts that hold are computed; the token after them never is.
    request.computed = len(request.tokens) - 1
    # What would change an adjusted token's logits is known only when the tokens before it are: such requests go one by one.
    request.drafts = [] if finished or request.logits_processor else outcome.drafts[: max(request.left - 1, 0)]
    return events


def _append(request: Request, sampled: SampledToken) -> tuple[Token, Finished | None]:
    may_end = request.may_end
    ends = may_end and sampled.token in request.stop_tokens
    request.tokens.append(sampled.token)
    if request.logits_processor:
        request.logits_processor.push(sampled.token)
    if request.grammar and not ends:
        request.grammar.accept(sampled.token)
    text = "" if ends else request.text.push(sampled.token, may_stop=may_end)
    token = Token(sampled.token, text, sampled.logprob, sampled.top_tokens, sampled.top_logprobs)
    stop = sampled.token if ends else request.text.stopped_by
    if stop is not None or (request.grammar and request.grammar.finished):
        return token, Finished("stop", request.text.finish(), request.cached_tokens, stop)
    if not request.left:
        return token, Finished("length", request.text.finish(), request.cached_tokens)
    return token, None


def _prompt_scored(request: Request) -> PromptLogprobs:
    """Scores are of the token after each; the prompt's are of each token."""

    def shifted(parts: list[np.ndarray], first: float) -> np.ndarray:
        values = np.concatenate(parts)[: len(request.prompt) - 1]
        return np.concatenate([np.full((1, *values.shape[1:]), first, values.dtype), values])

    return PromptLogprobs(
        shifted([s.logprobs for s in request.scores], np.nan),
        shifted([s.top_tokens for s in request.scores], 0),
        shifted([s.top_logprobs for s in request.scores], np.nan),
    )
