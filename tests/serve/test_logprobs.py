"""Log-probabilities as JSON: no infinity, and no candidate lost because another one is called the same."""

from __future__ import annotations

import math

import numpy as np

from jax_mla_cp.engine import PromptLogprobs, Token
from jax_mla_cp.serve.logprobs import chat_logprobs, completion_logprobs, prompt_logprobs
from jax_mla_cp.serve.token_texts import TokenTexts

A, OTHER_A, B, C = range(4)
TOP = np.asarray([OTHER_A, B, A, C], np.int32)
LOGPROBS = np.asarray([-0.5, -1.0, -2.0, -math.inf], np.float32)


class Texts(TokenTexts):
    """Two tokens are called a."""

    def __init__(self) -> None:
        super().__init__(None)
        self._texts = {A: "a", OTHER_A: "a", B: "b", C: "c"}


def test_the_sampled_token_keeps_its_name_and_its_number() -> None:
    found = completion_logprobs(Texts(), A, -2.0, TOP, LOGPROBS, 2, 9)
    assert found.top_logprobs == [{"token_id:1": -0.5, "b": -1.0, "a": -2.0}]
    assert (found.tokens, found.token_logprobs, found.text_offset) == (["a"], [-2.0], [9])
    assert completion_logprobs(Texts(), B, -1.0, TOP, LOGPROBS, 3, 0).top_logprobs == [
        {"a": -0.5, "b": -1.0, "token_id:0": -2.0}
    ]
    assert completion_logprobs(Texts(), A, -2.0, TOP, LOGPROBS, 0, 0).top_logprobs == [{}]


def test_what_can_not_be_is_a_number_that_json_has() -> None:
    found = completion_logprobs(Texts(), C, -math.inf, TOP, LOGPROBS, 4, 0)
    assert (
        found.token_logprobs == [-9999.0]
        and found.top_logprobs[0] is not None
        and found.top_logprobs[0]["c"] == -9999.0
    )
    chat = chat_logprobs(Texts(), Token(C, "c", -math.inf, TOP, LOGPROBS), 4)
    assert chat.logprob == chat.top_logprobs[3].logprob == -9999.0
    scored = PromptLogprobs(
        np.asarray([math.nan, -math.inf], np.float32), np.stack([TOP] * 2), np.stack([LOGPROBS] * 2)
    )
    first, second = prompt_logprobs(Texts(), [B, C], scored, 1)
    assert first is None and second is not None
    assert {token: (p.logprob, p.rank) for token, p in second.items()} == {"1": (-0.5, 1), "3": (-9999.0, 4)}
