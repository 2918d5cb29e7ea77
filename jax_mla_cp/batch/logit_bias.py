"""Changes to the logits that one request's next token is chosen by."""

from __future__ import annotations

import dataclasses

import numpy as np
from numpy.typing import NDArray


@dataclasses.dataclass(frozen=True)
class LogitBias:
    """Additive biases, repetition scales and a grammar's mask.

    The logit x of a listed token becomes `(x / scale if x > 0 else x * scale) + add`, any other stays. Tokens that the
    mask does not allow are -inf. `jax_mla_cp.batch.check` checks the values before a step.
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
        """True if a token of the vocabulary may still be chosen."""
        never = self.tokens[self.add == -np.inf]
        if self.mask is None:
            return len(never) < vocab_size
        return bool(clear_bits(self.mask, never, vocab_size).any())


def clear_bits(mask: NDArray[np.uint32], tokens: NDArray[np.int32], size: int) -> NDArray[np.uint32]:
    """The mask's words with the bits of these tokens cleared, and those from `size` on."""
    left = mask.copy()
    np.bitwise_and.at(left, tokens // 32, ~(np.uint32(1) << (tokens % 32).astype(np.uint32)))
    left[size // 32 :] &= np.uint32((1 << size % 32) - 1)
    return left
