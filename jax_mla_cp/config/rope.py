"""Rotary embedding, plain or YaRN: its numbers."""

from __future__ import annotations

import dataclasses
import math


@dataclasses.dataclass(frozen=True)
class RopeConfig:
    """Rotary embedding, plain or YaRN (arXiv:2309.00071; `modeling_rope_utils.py` of transformers)."""

    theta: float = 10000.0
    factor: float = 1.0
    """YaRN's context extension; 1 is plain RoPE."""
    original_max_position: int = 4096
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 0.0
    mscale_all_dim: float = 0.0
    yarn: bool = False
    interleaved: bool = True
    """The checkpoint rotates even/odd pairs; the loader reorders such weights into halves."""

    @property
    def amplitude(self) -> float:
        """Factor of cos and sin: 1 whenever `mscale == mscale_all_dim`."""
        if not self.yarn:
            return 1.0
        if self.mscale and self.mscale_all_dim:
            return yarn_mscale(self.factor, self.mscale) / yarn_mscale(self.factor, self.mscale_all_dim)
        return yarn_mscale(self.factor, 1.0)


def yarn_mscale(factor: float, mscale: float) -> float:
    """`0.1 m ln(factor) + 1`, YaRN's attention temperature (arXiv:2309.00071, equation 22)."""
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0
