"""Causal attention: one interface over FlashAttention-3 and XLA. Prefill, chunked prefill, decode and verification are all rows."""

from __future__ import annotations

import logging
from typing import Literal, get_args

import jax
from jaxtyping import Array, Float, Int32

from jax_mla_cp.attention import fa3, xla
from jax_mla_cp.batch.rows import Rows
from jax_mla_cp.config.errors import ConfigError, check_choice
from jax_mla_cp.config.model import ModelConfig

__all__ = [
    "Implementation",
    "Resolved",
    "attend_absorbed",
    "attend_expanded",
    "page_multiple",
    "resolve_implementation",
    "schedule",
]

log = logging.getLogger(__name__)

Implementation = Literal["auto", "fa3", "xla"]
Resolved = Literal["fa3", "xla"]


def resolve_implementation(
    implementation: Implementation, config: ModelConfig, dtype: jax.typing.DTypeLike
) -> Resolved:
    """Resolves "auto": FlashAttention-3 where it runs, otherwise XLA; on a GPU a warning then says why.

    Raises:
      ConfigError: "fa3" was asked for and can't run; the message says why.
    """
    check_choice("attention", implementation, get_args(Implementation))
    if implementation == "xla":
        return "xla"
    problem = fa3.unsupported_reason(config, dtype)
    if problem is None:
        return "fa3"
    if implementation == "fa3":
        raise ConfigError("attention", f"fa3 can't run: {problem}. Or use attention='xla', which runs anywhere.")
    if jax.default_backend() != "cpu":
        log.warning("attention runs in XLA, several times slower than FlashAttention-3: %s.", problem)
    return "xla"


def page_multiple(implementation: Resolved) -> int:
    """Divides every page size that the implementation can read."""
    return fa3.PAGE_MULTIPLE if implementation == "fa3" else 1


def schedule(rows: Rows, tokens: int, heads: int, implementation: Resolved) -> Rows:
    """Adds to the rows the splits of their keys, which are the same in all layers. Call it once a step.

    Args:
      tokens, heads: those of each `attend_absorbed` call on this rank.
    """
    return fa3.schedule(rows, tokens, heads) if implementation == "fa3" else rows


def attend_expanded(
    q: Float[Array, "T n h+r"],
    kv: Float[Array, "K n h+r+v"],
    rows: Rows,
    *,
    scale: float,
    implementation: Resolved = "xla",
) -> Float[Array, "T n v"]:
    """Causal attention of rows over per-head keys and values.

    Args:
      q: queries of this rank's tokens and heads.
      kv: the packed keys and values of all requests, a head's value beside its key; a row's begin at `rows.kv_start`.
      rows: which queries see which keys.
      scale: the factor of the scores.
      implementation: "fa3" needs bfloat16 and the dims of its kernels (attention/fa3.py).

    Returns: outputs in q's dtype; zero for tokens that belong to no row. Softmax and sums are float32.
    """
    return _IMPLEMENTATIONS[implementation].attend_expanded(q, kv, rows, scale=scale)


def attend_absorbed(
    q_latent: Float[Array, "n T R"],
    q_rope: Float[Array, "T n r"],
    pages: Float[Array, "pages page_size R+r"],
    page_table: Int32[Array, "B W"],
    rows: Rows,
    *,
    scale: float,
    implementation: Resolved = "xla",
) -> Float[Array, "n T R"]:
    """Causal attention of rows over the cached latents themselves, which are keys and (their first R) values.

    Args:
      q_latent: queries with the up-projection of the keys folded in (DeepSeek-V2, arXiv:2405.04434, section 2.1.2), head
        by head, as the batched product makes them.
      q_rope: their roped part.
      pages: the cache; page_table: each row's pages in it, in order. What the table or a page holds past a row's
        `kv_len` is never used.
      rows, scale, implementation: as in `attend_expanded`.

    Returns: outputs in latent space, head by head, in q_latent's dtype; zero for tokens that belong to no row.
    """
    return _IMPLEMENTATIONS[implementation].attend_absorbed(q_latent, q_rope, pages, page_table, rows, scale=scale)


_IMPLEMENTATIONS = {"fa3": fa3, "xla": xla}
