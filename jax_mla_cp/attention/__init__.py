"""One seam: rows in, outputs out. Prefill, chunked prefill, decode and verification are all rows."""

from __future__ import annotations

from jaxtyping import Array, Float, Int32

from jax_mla_cp.attention import xla
from jax_mla_cp.attention.rows import Rows
from jax_mla_cp.config import ConfigError, Implementation

__all__ = ["Rows", "attend_absorbed", "attend_expanded", "resolve_implementation"]


def resolve_implementation(implementation: Implementation) -> Implementation:
    """The implementation that runs here for what was asked for. "auto" never hides an error of "fa3".

    Raises:
      ConfigError: "fa3", whose kernels this version does not have.
    """
    if implementation not in ("auto", "fa3", "xla"):
        raise ConfigError(f"--attention must be auto, fa3 or xla, got {implementation!r}.")
    if implementation == "fa3":
        raise ConfigError(
            "--attention fa3: this version has no FlashAttention-3 kernels yet. Use --attention xla (or auto)."
        )
    return "xla"


def attend_expanded(
    q: Float[Array, "T n d"],
    k: Float[Array, "K n d"],
    v: Float[Array, "K n v"],
    rows: Rows,
    *,
    scale: float,
    implementation: Implementation = "auto",
) -> Float[Array, "T n v"]:
    """Causal attention of rows over per-head keys and values, `d = h + r`.

    Args:
      q: queries of this rank's tokens and heads.
      k, v: the packed keys and values of all requests; a row's begin at `rows.kv_start`.
      rows: which queries see which keys.
      scale: what scores are multiplied with.

    Returns: outputs in q's dtype; zero for tokens that belong to no row. Softmax and sums are float32.

    Raises:
      ConfigError: the implementation can't run here.
    """
    resolve_implementation(implementation)
    return xla.attend_expanded(q, k, v, rows, scale=scale)


def attend_absorbed(
    q_latent: Float[Array, "T n R"],
    q_rope: Float[Array, "T n r"],
    pages: Float[Array, "pages page_size R+r"],
    page_table: Int32[Array, "B W"],
    rows: Rows,
    *,
    scale: float,
    implementation: Implementation = "auto",
) -> Float[Array, "T n R"]:
    """Causal attention of rows over the cached latents themselves, which are keys and (their first R) values.

    Args:
      q_latent: queries with the up-projection of the keys folded in (DeepSeek-V2, arXiv:2405.04434, section 2.1.2).
      q_rope: their roped part.
      pages: the cache; page_table: each row's pages in it, in order. What the table or a page holds past a row's
        `kv_len` is never used.
      rows, scale: as in `attend_expanded`.

    Returns: outputs in latent space, in q_latent's dtype; zero for tokens that belong to no row.

    Raises:
      ConfigError: the implementation can't run here.
    """
    resolve_implementation(implementation)
    return xla.attend_absorbed(q_latent, q_rope, pages, page_table, rows, scale=scale)
