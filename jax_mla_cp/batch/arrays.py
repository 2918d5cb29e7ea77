"""What a step is given: its requests' work on the host, and the arrays that become of it on the devices.

`jax_mla_cp.batch.layout` makes the one into the other.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import PartitionSpec
from numpy.typing import NDArray

from jax_mla_cp.engine.logits_processor import Adjust
from jax_mla_cp.batch.rows import Rows
from jax_mla_cp.cache import CacheShape
from jax_mla_cp.config.model import Form
from jax_mla_cp.mesh import DP, TOKENS


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How the next token is chosen. `temperature` 0 is greedy; `top_p` 1, `top_k` 0 and `min_p` 0 are off."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0
    min_p: float = 0.0
    """Tokens less likely than `min_p` times the most likely one, at this temperature, are not drawn."""


@dataclasses.dataclass(frozen=True)
class Work:
    """One request's part of one step."""

    tokens: Sequence[int] | NDArray[np.integer[Any]]
    """The new tokens, at positions `cached` and following. The last `drafts` of them are guesses."""
    cached: int
    """Tokens whose latents are in the pages already."""
    pages: Sequence[int]
    """The request's pages, in order; at least those that the new tokens reach. Ids are local to the dp group."""
    sampling: Sampling | None = None
    """None: nothing is sampled after these tokens (they end inside a prompt)."""
    embeds: NDArray[np.floating[Any]] | None = None
    """[len(tokens), D]: input embeddings in place of the tokens', for all requests of a step or for none."""
    drafts: int = 0
    """Guesses among the tokens: after the token before them and after each of them, a token is sampled."""
    next_token: int | None = None
    """The token that follows, for tokens that end inside a prompt; the MTP layer reads it."""
    adjust: Adjust | None = None
    """What is done to the logits before the token after these is chosen. Not with drafts: what it does depends on them."""
    score: bool = False
    """The log-probability of the token after each of these is wanted too (`runner.Scored`)."""


@dataclasses.dataclass(frozen=True)
class BatchShape:
    """What is the same in the shapes of all steps, per dp group."""

    dp: int
    cp: int
    requests: int
    """Most requests in a step; a multiple of cp."""
    table_width: int
    """Pages of the longest request."""
    expanded_keys: int
    """Keys that the expanded form has room for, a multiple of the page size; 0: every row is absorbed."""
    cache: CacheShape
    form: Form = "auto"
    draft_tokens: int = 0
    """Most drafts of a request, and how many the step proposes; 0: no speculation."""

    @property
    def samples(self) -> int:
        """Places for sampled tokens, per request."""
        return 1 + self.draft_tokens

    @property
    def fresh(self) -> int:
        """Most pages of a request that a step begins and does not fill: the last, and those that recycled drafts reach."""
        return 1 + -(-max(self.draft_tokens - 1, 0) // self.cache.page_size)

    def __post_init__(self) -> None:
        if self.requests < 1 or self.requests % self.cp:
            raise ValueError(f"requests must be a positive multiple of cp={self.cp}, got {self.requests}.")
        if self.expanded_keys % self.cache.page_size:
            raise ValueError(
                f"expanded_keys must be a multiple of page_size={self.cache.page_size}, got {self.expanded_keys}."
            )


@dataclasses.dataclass(frozen=True)
class StepShape:
    """What differs between the programs: the shape of one step."""

    tokens: int
    """Of each rank's buffer."""
    absorbed_tokens: int
    """The first so many tokens of a buffer may be of absorbed rows; only they take that form's products."""
    expanded_keys: int
    """`BatchShape.expanded_keys`, or 0: the step has no expanded row."""
    scored: bool = False
    """The step also tells the log-probability of the token after each token."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Batch:
    """The arrays of a step. The comments give each one's shape on a device and how it is sharded.

    `T` tokens of a rank's buffer, `I` requests, `W` pages of the longest one, `B = 2 I` rows, `K` expanded keys, `d` drafts
    of a request, `J = I (1 + d)` places for sampled tokens, request after request.
    """

    tokens: Any  # int32 [T]            P(("dp", "cp"))
    next_tokens: Any  # int32 [T]       P(("dp", "cp"))  the token after each; -1: the step samples it, or nobody knows
    embeds: Any  # float [T, D] or None P(("dp", "cp"))
    positions: Any  # int32 [T]         P(("dp", "cp"))
    num_tokens: Any  # int32 [1]        P(("dp", "cp"))  tokens that exist; the rest of the buffer is padding
    slots: Any  # int32 [cp T]          P("dp")          where each rank's tokens go in the cache
    fresh: Any  # int32 [max(2, I ..)]  P("dp")          pages to zero first, `BatchShape.fresh` of each request
    page_table: Any  # int32 [I, W]     P("dp")
    key_pages: Any  # int32 [K / page]  P("dp")          pages of the packed keys, none without expanded rows
    num_keys: Any  # int32 [1]          P("dp")          keys that the packed ones reach to
    expanded: Rows  # int32 [B]         P(("dp", "cp"))
    absorbed: Rows  # int32 [B]         P(("dp", "cp"))
    last_index: Any  # int32 [J]        P(("dp", "cp"))  where the tokens sampled after are on this rank, or T
    sampling: SamplingArrays
    speculation: SpeculationArrays | None  # None: d = 0
    absorbed_tokens: int = dataclasses.field(metadata={"static": True})  # `StepShape.absorbed_tokens`


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SamplingArrays:
    """Per place, the places of `I / cp` requests on a device: P(("dp", "cp"))."""

    temperature: Any  # float32 [J]; 0 where nothing is sampled
    top_p: Any  # float32 [J]
    top_k: Any  # int32 [J]
    min_p: Any  # float32 [J]
    seed: Any  # uint32 [J, 2]
    position: Any  # int32 [J]: the position of the token that is sampled


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SpeculationArrays:
    """Per request, the same on all cp ranks: P("dp")."""

    drafts: Any  # int32 [I, d]: the guesses among the request's tokens; -1 where there is none
    first: Any  # int32 [I]: the position of the first token that is sampled after
    room: Any  # int32 [I]: positions below may be written; 0 for places without a request


def batch_specs(batch: Batch) -> Batch:
    """A Batch of PartitionSpecs, with None where the batch has None."""
    groups = {"slots", "fresh", "page_table", "key_pages", "num_keys", "speculation"}

    def spec(name: str) -> Any:
        axes = PartitionSpec(DP) if name in groups else PartitionSpec(TOKENS)
        return jax.tree.map(lambda _: axes, getattr(batch, name))

    arrays = {f.name: spec(f.name) for f in dataclasses.fields(Batch) if f.name != "absorbed_tokens"}
    return Batch(**arrays, absorbed_tokens=batch.absorbed_tokens)
