"""Penalties, logit bias, banned tokens and grammar masks of a request, on the host.

The definitions are vLLM's (vllm/v1/sample/ops/penalties.py, vllm/model_executor/layers/utils.py). With a repetition penalty
r, the logit x of a token that occurs in the prompt or the output becomes x / r if it is positive, x r if not. A token that
occurs c times in the output loses `frequency_penalty * c`, and `presence_penalty` once. The logit bias is added last.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from jax_mla_cp.batch.logit_bias import LogitBias, clear_bits

_FLOAT32 = np.finfo(np.float32)


class LogitsProcessor:
    """One request's logits processor; `push` follows its output."""

    def __init__(
        self,
        prompt: Sequence[int],
        *,
        presence_penalty: float = 0.0,
        frequency_penalty: float = 0.0,
        repetition_penalty: float = 1.0,
        logit_bias: Mapping[int, float] = {},
        banned: Collection[int] = (),
    ):
        """Args:
          logit_bias: added to the logits of these tokens.
          banned: tokens that `bias(ban=True)` rules out: the stop tokens, before `min_tokens`.

        Raises:
          ValueError: a number is not finite, or the repetition penalty is not a positive float32.
        """
        numbers = {"presence_penalty": presence_penalty, "frequency_penalty": frequency_penalty}
        for name, value in (numbers | {f"logit_bias[{t}]": bias for t, bias in logit_bias.items()}).items():
            if not math.isfinite(value):
                raise ValueError(f"{name} must be a finite number, got {value}.")
        if not _FLOAT32.tiny <= repetition_penalty <= _FLOAT32.max:
            raise ValueError(f"repetition_penalty must be a positive float32, got {repetition_penalty}.")
        self._presence, self._frequency, self._repetition = presence_penalty, frequency_penalty, repetition_penalty
        self._counts_output = presence_penalty != 0 or frequency_penalty != 0
        seen = np.unique(np.asarray(prompt, np.int32)) if repetition_penalty != 1 else np.zeros(0, np.int32)
        bias = np.array(sorted(logit_bias), np.int32)
        self._banned = np.unique(np.array(list(banned), np.int32))
        # All arrays below have an entry for each of these tokens.
        self._tokens = np.unique(np.concatenate([seen, bias, self._banned]))
        self._bias = np.zeros(len(self._tokens))
        self._bias[np.searchsorted(self._tokens, bias)] = [logit_bias[token] for token in bias.tolist()]
        self._count = np.zeros(len(self._tokens), np.int64)
        self._seen = np.isin(self._tokens, seen)

    @property
    def follows_output(self) -> bool:
        """True if the bias depends on the sampled tokens."""
        return self._counts_output or self._repetition != 1

    def push(self, token: int) -> None:
        """Counts a sampled token."""
        if not self.follows_output:
            return
        at = int(np.searchsorted(self._tokens, token))
        if at == len(self._tokens) or self._tokens[at] != token:
            self._tokens = np.insert(self._tokens, at, token)
            self._bias = np.insert(self._bias, at, 0.0)
            self._count = np.insert(self._count, at, 0)
            self._seen = np.insert(self._seen, at, False)
        self._count[at] += 1
        self._seen[at] = True

    def bias(self, ban: bool, mask: NDArray[np.uint32] | None = None) -> LogitBias | None:
        """The bias of the next token's logits; None if there is none.

        Args:
          ban: rules out the banned tokens, unless the mask allows no other: the grammar is at its end then.
          mask: the grammar's, as in `LogitBias`.
        """
        add = self._bias - self._frequency * self._count - self._presence * (self._count > 0)
        scale = np.where(self._seen, self._repetition, 1.0)
        if ban and (mask is None or clear_bits(mask, self._banned, 32 * len(mask)).any()):
            add[np.searchsorted(self._tokens, self._banned)] = -np.inf
        changed = (add != 0) | (scale != 1)
        if mask is None and not changed.any():
            return None
        return LogitBias(
            self._tokens[changed], add[changed].astype(np.float32), scale[changed].astype(np.float32), mask
        )
