"""`CompiledGrammar`: the state of one output within a grammar."""

from __future__ import annotations

import numpy as np
from llguidance import LLMatcher
from numpy.typing import NDArray

from jax_mla_cp.engine import GrammarError

_TOO_COMPLEX = (
    "the output can't be continued: after what has been generated, too many alternatives of the schema or grammar are open. "
    "Simplify it, above all alternatives that begin alike and long patterns."
)


class CompiledGrammar:
    """Implements `jax_mla_cp.engine.Grammar`."""

    def __init__(self, matcher: LLMatcher, vocab_size: int):
        self._matcher = matcher
        self._words = -(-vocab_size // 32)

    def copy(self) -> CompiledGrammar:
        """An independent copy in the same state."""
        return CompiledGrammar(self._matcher.deep_copy(), 32 * self._words)

    def mask(self) -> NDArray[np.uint32]:
        """The allowed next tokens as a bit mask, in the format of `jax_mla_cp.batch.logit_bias.LogitBias.mask`.

        Raises:
          GrammarError: the mask would take too long to compute.
        """
        words = np.frombuffer(self._matcher.compute_bitmask(), np.uint32)[: self._words]
        if self._matcher.is_error():
            raise GrammarError(_TOO_COMPLEX)
        return np.concatenate([words, np.zeros(self._words - len(words), np.uint32)])

    def accept(self, token: int) -> None:
        """Advances the state by a sampled token.

        Raises:
          GrammarError: the grammar does not allow the token here, or has become too ambiguous.
        """
        allowed = self._matcher.validate_tokens([token]) == 1
        self._matcher.consume_token(token)
        if self._matcher.is_error():
            raise GrammarError(_TOO_COMPLEX if allowed else f"token {token} is not allowed here by the grammar.")

    @property
    def finished(self) -> bool:
        """The output is complete: only an EOS token may follow."""
        return self._matcher.is_stopped()
