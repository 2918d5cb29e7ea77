"""The choice of a request's form of attention: by arithmetic, and by the rates that the kernels reach.

Per query-key pair and head the expanded form does `h + r + v` multiply-adds, the absorbed one `2 R + r`; the expanded one
must up-project every key (`(R + r) (h + r + v)` each in one product, model/mla.py, whichever rank's queries see it), the
absorbed one only this rank's queries (`R (h + v)`).
"""

from __future__ import annotations

from typing import Literal

from jax_mla_cp.config.model import ModelConfig

Form = Literal["auto", "expanded", "absorbed"]

# Rate of FlashAttention-3 relative to a matrix product, on an H200 at 128K keys (docs/benchmarks.md).
_EXPANDED_RATE = 0.98
_ABSORBED_RATE = 0.90


def use_expanded(form: Form, config: ModelConfig, cp: int, num_new_tokens: int, num_computed_tokens: int) -> bool:
    """True if a request's `num_new_tokens` tokens after `num_computed_tokens` in the cache take the expanded form, on each of cp ranks.

    A single token (decode) is always absorbed: up-projecting a whole context for it never pays.
    """
    if form == "absorbed" or num_new_tokens == 1:
        return False
    if form == "expanded":
        return True
    r, h, v, rank = config.qk_rope_head_dim, config.qk_nope_head_dim, config.v_head_dim, config.kv_lora_rank
    pairs = (num_new_tokens * num_computed_tokens + num_new_tokens * (num_new_tokens + 1) / 2) / cp
    expanded = pairs * (h + r + v) / _EXPANDED_RATE + (rank + r) * (h + r + v) * (num_computed_tokens + num_new_tokens)
    absorbed = pairs * (2 * rank + r) / _ABSORBED_RATE + rank * (h + v) * num_new_tokens / cp
    return expanded < absorbed
