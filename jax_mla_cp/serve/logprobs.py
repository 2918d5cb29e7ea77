"""Log-probabilities in the formats of OpenAI's two APIs and of vLLM."""

from __future__ import annotations

import math

import numpy as np

from jax_mla_cp.engine import PromptLogprobs, Token
from jax_mla_cp.serve.schemas.responses import Logprobs, PromptLogprob, PromptLogprobsJson, TokenLogprob, TopLogprob
from jax_mla_cp.serve.token_texts import TokenTexts


def finite(logprob: float) -> float:
    """Replaces infinities and NaN, which JSON does not have, by -9999, as vLLM does."""
    return float(logprob) if math.isfinite(logprob) else -9999.0


def completion_logprobs(
    texts: TokenTexts,
    token: int,
    logprob: float,
    top_tokens: np.ndarray,
    top_logprobs: np.ndarray,
    count: int,
    offset: int,
) -> Logprobs:
    """One token in the format of /v1/completions, with the `count` most likely tokens and the token itself.

    Args:
      offset: where the token's text begins in the choice's text, in characters, the echo included. Beyond its end for tokens
        that a stop string cut off.
    """
    text, own = texts(token), finite(logprob)
    top: dict[str, float] = {}
    for other, value in zip(top_tokens[:count].tolist(), top_logprobs[:count].tolist(), strict=True):
        # Different tokens may have the same text: the sampled token keeps it, otherwise the more likely one.
        other_text = texts(other)
        ambiguous = other_text in top or (other_text == text and other != token)
        top[f"token_id:{other}" if ambiguous else other_text] = finite(value)
    if count:
        top[text] = own
    return Logprobs(tokens=[text], token_logprobs=[own], top_logprobs=[top], text_offset=[offset])


def echo_logprobs(
    texts: TokenTexts, prompt: list[int], offsets: list[int], scores: PromptLogprobs, count: int
) -> Logprobs:
    """An echoed prompt in the format of /v1/completions. Its first token has no log-probability."""
    first = Logprobs(tokens=[texts(prompt[0])], token_logprobs=[None], top_logprobs=[None], text_offset=[offsets[0]])
    rest = (
        completion_logprobs(
            texts, prompt[i], scores.logprobs[i], scores.top_tokens[i], scores.top_logprobs[i], count, offsets[i]
        )
        for i in range(1, len(prompt))
    )
    return concat([first, *rest])


def concat(parts: list[Logprobs]) -> Logprobs:
    return Logprobs(
        tokens=[x for part in parts for x in part.tokens],
        token_logprobs=[x for part in parts for x in part.token_logprobs],
        top_logprobs=[x for part in parts for x in part.top_logprobs],
        text_offset=[x for part in parts for x in part.text_offset],
    )


def prompt_logprobs(texts: TokenTexts, prompt: list[int], scores: PromptLogprobs, count: int) -> PromptLogprobsJson:
    """A prompt in vLLM's format: at each position the `count` most likely tokens and the prompt's own token."""
    positions: PromptLogprobsJson = [None]
    for i in range(1, len(prompt)):
        top = scores.top_tokens[i].tolist()
        candidates = {
            str(token): PromptLogprob(logprob=finite(value), rank=rank, decoded_token=texts(token))
            for rank, (token, value) in enumerate(zip(top[:count], scores.top_logprobs[i].tolist(), strict=False), 1)
        }
        own = prompt[i]
        rank = top.index(own) + 1 if own in top else None
        candidates[str(own)] = PromptLogprob(logprob=finite(scores.logprobs[i]), rank=rank, decoded_token=texts(own))
        positions.append(candidates)
    return positions


def chat_logprobs(texts: TokenTexts, event: Token, count: int) -> TokenLogprob:
    """One token in the format of /v1/chat/completions, with the `count` most likely tokens."""
    top = zip(event.top_tokens[:count].tolist(), event.top_logprobs[:count].tolist(), strict=True)
    return TokenLogprob(
        token=texts(event.token),
        logprob=finite(event.logprob),
        bytes=texts.bytes(event.token),
        top_logprobs=[TopLogprob(token=texts(t), logprob=finite(value), bytes=texts.bytes(t)) for t, value in top],
    )
