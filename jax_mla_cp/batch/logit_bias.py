"""What is done to one request's logits before its next token is chosen, as the step is given it."""

from __future__ import annotations

import dataclasses

import numpy as np
from numpy.typing import NDArray


@dataclasses.dataclass(frozen=True)
class LogitBias:
    """The changes to one place's logits. A listed token's logit x becomes `(x / scale if x > 0 else x * scale) + add`, any
    other stays; then whatever the mask does not allow is -inf.

    Which of the arrays' values make sense is looked at before a step (jax_mla_cp/batch/check.py).
    """

    tokens: NDArray[np.int32]
    """[n], strictly rising."""
    add: NDArray[np.float32]
    """[n]; may be -inf."""
    scale: NDArray[np.float32]
    """[n], positive."""
    mask: NDArray[np.uint32] | None = None
    """[ceil(V / 32)]: token t is allowed if bit t % 32 of word t // 32 is set. None: all are."""

    def allows_any(self, vocab_size: int) -> bool:
        """Whether any of the model's tokens is left. A model that gives the others -inf itself is not known here."""
        never = self.tokens[self.add == -np.inf]
        if self.mask is None:
            return len(never) < vocab_size
        return bool(without(self.mask, never, vocab_size).any())


def without(mask: NDArray[np.uint32], tokens: NDArray[np.int32], size: int) -> NDArray[np.uint32]:
    """The mask's words without these tokens, and without bits from `size` on."""
    left = mask.copy()
    np.bitwise_and.at(left, tokens // 32, ~(np.uint32(1) << (tokens % 32).astype(np.uint32)))
    left[size // 32 :] &= np.uint32((1 << size % 32) - 1)
    return left
