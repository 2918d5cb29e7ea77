"""The rows of an attention call: which queries see which keys."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
from jaxtyping import Array, Int32


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rows:
    """`B` rows; row b's queries are tokens `cu_q[b]` to `cu_q[b + 1]` of the rank's buffer, and may be none.

    Its last query sees the first `kv_len[b]` keys of its request, each query before it one key less.
    """

    cu_q: Int32[Array | np.ndarray, " B+1"]
    kv_len: Int32[Array | np.ndarray, " B"]
    kv_start: Int32[Array | np.ndarray, " B"]
    """Expanded form: where the request's keys begin in the packed ones. Rows of one request share their keys."""
    request: Int32[Array | np.ndarray, " B"]
    """The request's row in the page table."""
    splits: Int32[Array, " S"] | None = None
    """The division of the rows' keys over the GPU, made once for all layers (`attention.schedule`)."""
    max_splits: int = dataclasses.field(default=0, metadata={"static": True})
    """The most splits of a row among them."""
