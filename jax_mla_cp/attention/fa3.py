"""FlashAttention-3 (arXiv:2407.08608) through XLA FFI; the handlers are in ffi/.

Targets, each with a CUDA handler (Hopper, bfloat16) and a CPU handler of the same name and checks, in plain loops,
so that everything around a kernel is tested without a GPU:

- `mla_prefill_expanded`: per-head keys (192) and values (128), packed, rows may share keys;
- `mla_prefill_absorbed`: queries 512 + 64 over the paged latents, which all heads share;
- `mla_decode`: the same for few queries: the keys of a row are split over the GPU and the parts combined. `schedule_splits` chooses
  the splits, once for all layers.

A call reads its operands where they are: the value of a head beside its key, the roped key beside its latent in a page.
Row lengths, page tables and starts stay on the device; the launch is the same whatever they hold, so that XLA may record
it into a command buffer. No derivative, no `vmap`: calls are always inside `shard_map` or plain `jit`.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int32

from jax_mla_cp import extension
from jax_mla_cp.batch.rows import Rows
from jax_mla_cp.config.model import ModelConfig

PAGE_MULTIPLE = 64
"""The page size is a multiple of this: the absorbed kernels load tiles of 64 keys, each from one page (ffi/shapes.h)."""

DECODE_TOKENS = 256
"""The largest call of the absorbed form, in tokens, whose keys are split over the GPU. More tokens fill it without."""

_DIMS = {"kv_lora_rank": 512, "qk_rope_head_dim": 64, "qk_nope_head_dim": 128, "v_head_dim": 128}
_MAX_SPLITS, _MAX_SCHEDULED_ROWS = 128, 1024  # ffi/shapes.h
_PARTIAL_BYTES = 256 << 20  # of the splits' float32 outputs, which bounds their number when there are many tokens


def unsupported_reason(config: ModelConfig, dtype: jax.typing.DTypeLike) -> str | None:
    """The reason why FlashAttention-3 can't run this model on this machine's devices, and what to do; None if it can."""
    for name, size in _DIMS.items():
        if getattr(config, name) != size:
            return f"its kernels are for {name}={size}, the model has {getattr(config, name)}"
    if jnp.dtype(dtype) != jnp.bfloat16:
        return f"its kernels are for bfloat16, the model runs in {jnp.dtype(dtype)}. Use dtype='bfloat16'"
    return extension.cuda_problem()


def mla_prefill_expanded(
    q: Float[Array, "T n h+r"], kv: Float[Array, "K n h+r+v"], rows: Rows, *, scale: float
) -> tuple[Float[Array, "T n v"], Float[Array, "n T"]]:
    """Causal attention over packed keys and values, a head's value beside its key.

    Args:
      q: bfloat16 queries.
      kv: bfloat16; the last tile of 128 keys of a row may reach past its `kv_len`, and must hold finite numbers there.
      rows: `cu_q`, `kv_len` and `kv_start` are read. Rows may share keys.

    Returns: bfloat16 outputs, zero for tokens of no row; and each query's float32 log-sum-exp of its scaled scores,
      -inf for tokens of no row. Both vary over the mesh axes that any operand varies over.

    Raises:
      ConfigError: the extension is not installed.
      XlaRuntimeError: when it runs, if shapes or dtypes are not those above; names the argument, expected and got.
    """
    tokens, heads, dim = q.shape
    operands = (q, kv, rows.cu_q, rows.kv_start, rows.kv_len)
    out, lse, *_ = _call("mla_prefill_expanded", operands, (tokens, heads, kv.shape[2] - dim), rows, q, scale)
    return out, lse


def mla_prefill_absorbed(
    q_latent: Float[Array, "n T R"],
    q_rope: Float[Array, "T n r"],
    pages: Float[Array, "pages page_size R+r"],
    page_table: Int32[Array, "B W"],
    rows: Rows,
    *,
    scale: float,
) -> tuple[Float[Array, "n T R"], Float[Array, "n T"]]:
    """Causal attention over the paged latents, which are keys and (their first R numbers) values of all heads.

    Args:
      q_latent: bfloat16 queries in latent space, head by head, as the batched product with W_UK leaves them.
      q_rope: their roped part.
      pages: bfloat16, `page_size` a multiple of 64. The tile of 64 keys that holds a row's end must be finite.
      page_table: each row's pages, in order. What lies past its `kv_len` is not used.
      rows: `cu_q` and `kv_len` are read.

    Returns, raises: as `mla_prefill_expanded`; the output is in latent space, head by head.
    """
    heads, tokens, latent = q_latent.shape
    operands = (q_latent, q_rope, pages, page_table, rows.cu_q, rows.kv_len)
    out, lse, *_ = _call("mla_prefill_absorbed", operands, (heads, tokens, latent), rows, q_rope, scale)
    return out, lse


def mla_decode(
    q_latent: Float[Array, "n T R"],
    q_rope: Float[Array, "T n r"],
    pages: Float[Array, "pages page_size R+r"],
    page_table: Int32[Array, "B W"],
    rows: Rows,
    *,
    scale: float,
) -> tuple[Float[Array, "n T R"], Float[Array, "n T"]]:
    """As `mla_prefill_absorbed`, for rows of few queries (a decoded token, drafts to verify) and many keys.

    The number of splits of a row follows the work of all rows, so that the sum's rounding depends on the batch.

    Args:
      rows: as there; with `splits`, those of `schedule` for as many tokens and heads. Without them the call makes its own.

    Raises:
      ValueError: the splits are for another call.
    """
    heads, tokens, latent = q_latent.shape
    splits = jnp.zeros(0, jnp.int32) if rows.splits is None else rows.splits
    operands = (q_latent, q_rope, pages, page_table, rows.cu_q, rows.kv_len, splits)
    parts = _max_splits(heads, tokens)
    if rows.splits is not None and rows.max_splits != parts:
        raise ValueError(
            f"rows.splits: made for at most {rows.max_splits} splits, this call of {tokens} tokens and {heads} heads has room for "
            f"{parts}. Make them with attention.schedule(rows, {tokens}, {heads}, 'fa3')."
        )
    partial = ((parts, heads, tokens, latent), (parts, heads, tokens))
    out, lse, *_ = _call("mla_decode", operands, (heads, tokens, latent), rows, q_rope, scale, partial)
    return out, lse


def schedule(rows: Rows, tokens: int, heads: int) -> Rows:
    """See `jax_mla_cp.attention.schedule`."""
    count = rows.kv_len.shape[0]
    if not 0 < tokens <= DECODE_TOKENS or count > _MAX_SCHEDULED_ROWS:
        return rows
    result = jax.ShapeDtypeStruct((_splits_size(count),), jnp.int32)
    most = _max_splits(heads, tokens)
    sizes: dict[str, Any] = {"heads": np.int64(heads), "max_splits": np.int64(most)}
    splits = extension.call("schedule_splits", result, rows.cu_q, rows.kv_len, **sizes)
    return dataclasses.replace(rows, splits=splits, max_splits=most)


def attend_expanded(
    q: Float[Array, "T n h+r"], kv: Float[Array, "K n h+r+v"], rows: Rows, *, scale: float
) -> Float[Array, "T n v"]:
    """See `jax_mla_cp.attention.attend_expanded`."""
    return mla_prefill_expanded(q, kv, rows, scale=scale)[0]


def attend_absorbed(
    q_latent: Float[Array, "n T R"],
    q_rope: Float[Array, "T n r"],
    pages: Float[Array, "pages page_size R+r"],
    page_table: Int32[Array, "B W"],
    rows: Rows,
    *,
    scale: float,
) -> Float[Array, "n T R"]:
    """See `jax_mla_cp.attention.attend_absorbed`."""
    target = mla_decode if q_rope.shape[0] <= DECODE_TOKENS else mla_prefill_absorbed
    return target(q_latent, q_rope, pages, page_table, rows, scale=scale)[0]


def _max_splits(heads: int, tokens: int) -> int:
    return max(1, min(_MAX_SPLITS, _PARTIAL_BYTES // (4 * heads * tokens * _DIMS["kv_lora_rank"])))


def _splits_size(rows: int) -> int:
    return 4 * (-(-rows // 4) * 4)  # SplitsSize in ffi/shapes.h


def _call(
    target: str,
    operands: tuple[Any, ...],
    out: tuple[int, ...],
    rows: Rows,
    q: jax.Array,
    scale: float,
    partial: tuple[tuple[int, ...], ...] = (),
) -> Any:
    """The custom call: a bfloat16 output, the log-sum-exp, the scheduler's scratch, and float32 partial results.

    Args:
      q: queries [T, n, ..].
    """
    tokens, heads, _ = q.shape
    scheduler = _splits_size(rows.kv_len.shape[0]) + 1  # SchedulerSize in ffi/shapes.h
    results = [
        jax.ShapeDtypeStruct(shape, dtype)
        for shape, dtype in (
            (out, jnp.bfloat16),
            ((heads, tokens), jnp.float32),
            ((scheduler,), jnp.int32),
            *((shape, jnp.float32) for shape in partial),
        )
    ]
    return extension.call(target, results, *operands, scale=np.float32(scale))
