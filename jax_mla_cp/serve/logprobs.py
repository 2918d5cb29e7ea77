"""Log-probabilities in the forms of OpenAI's two APIs and of vLLM."""

from __future__ import annotations

import math

import numpy as np

from jax_mla_cp.engine import PromptLogprobs, Token
from jax_mla_cp.serve.names import TokenNames
from jax_mla_cp.serve.schemas import Logprobs, PromptLogprob, PromptLogprobsJson, TokenLogprob, TopLogprob


def finite(logprob: float) -> float:
    """JSON has no infinity; -9999 stands for what can't be, as in vLLM."""
    return float(logprob) if math.isfinite(logprob) else -9999.0


def entry(
    names: TokenNames, token: int, logprob: float, top_tokens: np.ndarray, top_logprobs: np.ndarray, count: int, at: int
) -> Logprobs:
    """One token for /v1/completions, with the `count` likeliest, and itself with the same number.

    Args:
      at: where its text begins.
    """
    name, own = names(token), finite(logprob)
    top: dict[str, float] = {}
    for other, value in zip(top_tokens[:count].tolist(), top_logprobs[:count].tolist(), strict=True):
        # Two tokens may be called the same: the text is the sampled one's, or the likelier one's.
        known = names(other)
        taken = known in top or (known == name and other != token)
        top[f"token_id:{other}" if taken else known] = finite(value)
    if count:
        top[name] = own
    return Logprobs(tokens=[name], token_logprobs=[own], top_logprobs=[top], text_offset=[at])


def prompt_entries(
    names: TokenNames, prompt: list[int], offsets: list[int], scored: PromptLogprobs, count: int
) -> Logprobs:
    """A prompt for /v1/completions with `echo`. Nothing is known of its first token."""
    first = Logprobs(tokens=[names(prompt[0])], token_logprobs=[None], top_logprobs=[None], text_offset=[offsets[0]])
    rest = (
        entry(names, prompt[i], scored.logprobs[i], scored.top_tokens[i], scored.top_logprobs[i], count, offsets[i])
        for i in range(1, len(prompt))
    )
    return join([first, *rest])


def join(parts: list[Logprobs]) -> Logprobs:
    return Logprobs(**{field: [x for part in parts for x in getattr(part, field)] for field in Logprobs.model_fields})


def prompt_logprobs(names: TokenNames, prompt: list[int], scored: PromptLogprobs, count: int) -> PromptLogprobsJson:
    """A prompt in vLLM's form: the `count` likeliest tokens in each place, and the prompt's own."""
    found: PromptLogprobsJson = [None]
    for i in range(1, len(prompt)):
        top = scored.top_tokens[i].tolist()
        here = {
            str(token): PromptLogprob(logprob=finite(value), rank=rank, decoded_token=names(token))
            for rank, (token, value) in enumerate(zip(top[:count], scored.top_logprobs[i].tolist(), strict=False), 1)
        }
        own = prompt[i]
        rank = top.index(own) + 1 if own in top else None
        here[str(own)] = PromptLogprob(logprob=finite(scored.logprobs[i]), rank=rank, decoded_token=names(own))
        found.append(here)
    return found


def chat_entry(names: TokenNames, event: Token, count: int) -> TokenLogprob:
    """One token for /v1/chat/completions."""
    top = zip(event.top_tokens[:count].tolist(), event.top_logprobs[:count].tolist(), strict=True)
    return TokenLogprob(
        token=names(event.token),
        logprob=finite(event.logprob),
        bytes=names.bytes(event.token),
        top_logprobs=[TopLogprob(token=names(t), logprob=finite(value), bytes=names.bytes(t)) for t, value in top],
    )
