"""Roofline: the device's ceilings, measured in the same run, and the time a cost would take at them."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from jax_mla_cp.batch.form import Form
from jax_mla_cp.batch.rows import Rows
from jax_mla_cp.batch.zigzag import plan
from jax_mla_cp.bench.data import normal
from jax_mla_cp.bench.timing import measure
from jax_mla_cp.config.model import ModelConfig


@dataclasses.dataclass(frozen=True)
class Ceilings:
    """Measured peak rates of one device."""

    matmul: float
    """FLOP/s of a large bfloat16 matmul on random numbers: the better of two."""
    copy: float
    """Bytes/s of a copy, reads and writes together."""
    read: float
    """Bytes/s of a maximum over rows, which reads and hardly writes: faster than a copy."""


def measure_ceilings(*, small: bool, samples: int = 10) -> Ceilings:
    """Measures matmuls of 8192 x 8192 x 8192 and 32768 x 7168 x 4096, a copy of 4 GB and a read of 4 GB.

    Args:
      small: use sizes that a CPU can run.
    """
    products, rows = (((512, 512, 512),), 1 << 10) if small else (((8192, 8192, 8192), (32768, 7168, 4096)), 1 << 18)
    product = jax.jit(jnp.matmul)
    rates = []
    for m, k, n in products:
        a, b = normal(0, (m, k)), normal(1, (k, n))
        rates.append(2 * m * k * n / measure(functools.partial(product, a, b), samples=samples).seconds)
    x = normal(2, (rows, 8192))
    copy, largest = jax.jit(jnp.copy), jax.jit(lambda x: x.max(axis=1))
    copied = measure(lambda: copy(x), samples=samples)
    read = measure(lambda: largest(x), samples=samples)
    return Ceilings(max(rates), 2 * x.nbytes / copied.seconds, x.nbytes / read.seconds)


@dataclasses.dataclass(frozen=True)
class Cost:
    """The minimal FLOPs and memory traffic of a computation."""

    flops: float = 0.0
    moved: float = 0.0
    """Bytes read and written, at the rate of a copy."""
    read: float = 0.0
    """Bytes read where hardly any are written, at the rate of a read."""

    def seconds(self, ceilings: Ceilings) -> float:
        """Time at the ceilings, arithmetic and memory overlapped."""
        return max(self.flops / ceilings.matmul, self.moved / ceilings.copy + self.read / ceilings.read)

    def row(self, seconds: float, ceilings: Ceilings) -> dict[str, float]:
        """Columns of a table's row, for a measured time."""
        out = {"roof_ms": self.seconds(ceilings) * 1e3, "fraction": self.seconds(ceilings) / seconds}
        if self.flops:
            out |= {"tflops": self.flops / seconds / 1e12}
        if self.moved or self.read:
            out |= {"gbs": (self.moved + self.read) / seconds / 1e9}
        return out


def rank_rows(seq: int, cp: int, rank: int) -> tuple[Rows, int]:
    """A rank's rows of one prompt of `seq` tokens, and the number of their query-key pairs. cp 1 is unsharded: one row."""
    if cp == 1:
        lengths, ends = np.array([seq]), np.array([seq])
    else:
        p = plan([seq], [0], cp=cp)
        local = p.row_rank == rank
        lengths, ends = p.row_len[local].astype(np.int64), p.row_kv_len[local].astype(np.int64)
    pairs = int((lengths * ends - lengths * (lengths - 1) // 2).sum())
    zeros = np.zeros(len(lengths), np.int32)
    cu_q = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    return Rows(cu_q=cu_q, kv_len=ends.astype(np.int32), kv_start=zeros, request=zeros), pairs


def attention_flops(form: Form, config: ModelConfig, pairs: int, heads: int) -> float:
    """FLOPs of attention's two matmuls for `pairs` unmasked query-key pairs; a multiply-add is 2."""
    c = config
    if form == "expanded":
        per_pair = c.qk_nope_head_dim + c.qk_rope_head_dim + c.v_head_dim
    else:
        per_pair = 2 * c.kv_lora_rank + c.qk_rope_head_dim
    return 2.0 * per_pair * pairs * heads


def attention_bytes(form: Form, config: ModelConfig, queries: int, keys: int, heads: int) -> float:
    """Bytes of queries, outputs, and each key once, in bfloat16: they take little time unless there are few queries."""
    c = config
    if form == "expanded":
        dim = c.qk_nope_head_dim + c.qk_rope_head_dim
        return 2.0 * heads * (queries * (dim + c.v_head_dim) + keys * (dim + c.v_head_dim))
    return 2.0 * (heads * queries * (2 * c.kv_lora_rank + c.qk_rope_head_dim) + keys * c.latent_dim)
