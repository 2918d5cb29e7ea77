"""The grid of programs, and batches that fit it: it turns `StepRequest`s into arrays with a fixed set of shapes."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import get_args

import jax
import numpy as np

from jax_mla_cp import cache
from jax_mla_cp.batch import zigzag
from jax_mla_cp.batch.arrays import Batch
from jax_mla_cp.batch.check import check_requests
from jax_mla_cp.batch.columns import RequestColumns
from jax_mla_cp.batch.form import Form
from jax_mla_cp.batch.layout import KEY_ALIGN, StepLayout, build_batch, lay_out, packed_keys
from jax_mla_cp.batch.packing import DeviceBatch
from jax_mla_cp.batch.page_table import TableMirror
from jax_mla_cp.batch.shapes import BatchShape, CacheShape, StepShape
from jax_mla_cp.batch.step_request import StepRequest
from jax_mla_cp.config.errors import ConfigError, check_choice
from jax_mla_cp.mesh import mesh_shape
from jax_mla_cp.model.loaded_model import Model
from jax_mla_cp.step.forward import to_devices

_SMALLEST_BUCKET = 16
_FINE_FROM = 4096
_ABSORBED_ONLY = 128
"""Tokens per rank up to which programs have no expanded form: no row gains by it (batch/form.py: the crossover against a
long prefix is at 209). Also the head of the buffer that a program with expanded rows keeps for absorbed ones, decoding requests
above all, so that it need not do the absorbed form's products for the whole buffer."""

MAX_DRAFT_TOKENS = 4
"""The MTP layer is trained to predict one token; predictions from its own predictions are accepted less and less often."""


def token_buckets(largest: int) -> tuple[int, ...]:
    """Bucket sizes up to `largest` tokens: doubling up to 4K, then at most 1/8 apart, because padding of long steps is expensive.

    >>> token_buckets(6000)
    (16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 4608, 5184, 5832, 6000)
    >>> token_buckets(2100)
    (16, 32, 64, 128, 256, 512, 1024, 2100)
    """
    sizes: list[int] = []
    size = _SMALLEST_BUCKET
    while size < largest and not (size < _FINE_FROM and largest <= size + size // 8):  # `largest` serves both
        sizes.append(size)
        size = 2 * size if size < _FINE_FROM else size + size // 8
    return (*sizes, largest)


@dataclasses.dataclass(frozen=True)
class Planner:
    """Makes device-ready batches for one model and one cache.

    One program is compiled per `StepShape`: with `form="auto"` one for small buckets, and for the others one with expanded
    rows beside few absorbed tokens (the common one), one beside many, and one without expanded rows. Steps that
    return prompt log-probabilities have a program for each bucket beside these.
    """

    model: Model
    shape: BatchShape
    buckets: tuple[int, ...]
    """Tokens per rank, rising."""

    @classmethod
    def create(
        cls,
        model: Model,
        *,
        cache_tokens: int,
        page_size: int = 64,
        max_requests: int = 1,
        max_model_len: int | None = None,
        prefill_chunk: int | None = None,
        form: Form = "auto",
        draft_tokens: int = 0,
    ) -> Planner:
        """Fixes the shapes of all steps.

        Args:
          cache_tokens: tokens that a dp group's pages hold, rounded up to whole pages.
          page_size: tokens of a page.
          max_requests: requests in a step, per dp group.
          max_model_len: maximum length of a request, prompt and output; default: what the model and the cache allow.
          prefill_chunk: maximum number of new tokens in a step of a dp group, not counting those of decoding requests (one, and
            drafts); default: `max_model_len`.
          form: of attention. "auto" decides by shape; the others are for all requests but decoding ones.
          draft_tokens: drafts that a step proposes and verifies for each request, with the model's MTP layer; 0: none.

        Raises:
          ConfigError: sizes that are not positive, a `max_model_len` beyond the model or the cache, or drafts without MTP layer.
        """
        if not 0 <= draft_tokens <= MAX_DRAFT_TOKENS:
            raise ConfigError("draft_tokens", f"must be 0 to {MAX_DRAFT_TOKENS}, got {draft_tokens}.")
        if draft_tokens and not model.build.mtp:
            raise ConfigError(
                "draft_tokens", f"{draft_tokens} needs the MTP layer, got a model without it. Load it with mtp=True."
            )
        sizes = {
            "cache_tokens": cache_tokens,
            "page_size": page_size,
            "max_requests": max_requests,
            "max_model_len": max_model_len,
        }
        for name, value in {**sizes, "prefill_chunk": prefill_chunk}.items():
            if value is not None and value < 1:
                raise ConfigError(name, f"must be at least 1, got {value}.")
        if page_size % (multiple := model.build.page_multiple):
            raise ConfigError(
                "page_size",
                f"must be a multiple of {multiple} for FlashAttention-3 (a tile of keys lies in one page), got {page_size}. "
                f"Use page_size={-(-page_size // multiple) * multiple}, or attention='xla'.",
            )
        check_choice("form", form, get_args(Form))
        mesh = mesh_shape(model.mesh)
        cache_shape = CacheShape(model.build.cache_layers, -(-cache_tokens // page_size), page_size)
        longest = min(model.config.max_position, cache_shape.tokens)
        max_model_len = longest if max_model_len is None else max_model_len
        if max_model_len > longest:
            raise ConfigError(
                "max_model_len",
                f"must be at most {longest}, got {max_model_len}: the model has {model.config.max_position} positions, "
                f"the cache holds {cache_shape.tokens} tokens.",
            )
        chunk = min(prefill_chunk or max_model_len, max_requests * max_model_len)
        # One request's keys, all of them; of several, those that fit beside the longest (the others are absorbed).
        keys = max_model_len if max_requests == 1 else max_model_len + chunk + KEY_ALIGN
        shape = BatchShape(
            dp=mesh.dp,
            cp=mesh.cp,
            # Recycled drafts write one slot per request, and of a single slot, XLA's scatter may copy the cache.
            max_requests=-(-max(max_requests, min(draft_tokens, 2)) // mesh.cp) * mesh.cp,
            max_pages=-(-max_model_len // page_size),
            expanded_keys=0 if form == "absorbed" else packed_keys(keys, page_size),
            cache=cache_shape,
            form=form,
            draft_tokens=draft_tokens,
        )
        return cls(model, shape, _buckets(chunk, max_requests, mesh.cp, shape.samples_per_request))

    def new_cache(self) -> jax.Array:
        """An empty cache of the planned size."""
        build = self.model.build
        return cache.create(self.shape.cache, build.config.latent_dim, build.dtype, self.model.mesh)

    def batch(self, requests: Sequence[StepRequest] | Sequence[Sequence[StepRequest]]) -> DeviceBatch:
        """The arrays of a step, on the devices. Request i of dp group g has row `g * shape.max_requests + i` of the results.

        Args:
          requests: a list of requests, or with dp > 1 one list per dp group.

        Raises:
          ValueError: a request that doesn't fit, with its index and what is allowed.
        """
        groups = [requests] if not requests or isinstance(requests[0], StepRequest) else requests
        # mypy does not conclude from the first item what the others are
        return to_devices(self.model, self.host_batch(groups))  # type: ignore[arg-type]

    def host_batch(self, groups: Sequence[Sequence[StepRequest]]) -> Batch:
        """`batch` before it goes to the devices: NumPy arrays, all devices' one after the other."""
        return build_batch(self.lay_out(groups), self.shape)

    def lay_out(self, groups: Sequence[Sequence[StepRequest]]) -> StepLayout:
        """A step's requests, one list per dp group: checked, divided over the ranks, and the program that they need.

        Raises:
          ValueError: as `batch`.
        """
        if len(groups) != self.shape.dp:
            raise ValueError(f"requests: one list per dp group is needed, {self.shape.dp} of them, got {len(groups)}.")
        columns = [RequestColumns.of(requests, self.shape) for requests in groups]
        for c in columns:
            check_requests(c, self.shape, self.model.config)
        # The zigzag gives every rank the same tokens in any order of the requests, so their forms don't change the bucket.
        loads = [zigzag.loads(c.num_new_tokens, c.num_computed_tokens, cp=self.shape.cp) for c in columns]
        rank_tokens, rank_pairs = (np.array(load) for load in zip(*loads, strict=True))
        bucket = self.bucket(int(rank_tokens.max()))
        layouts = [lay_out(c, self.shape, self.model.config, expand=self._may_expand(bucket)) for c in columns]
        if any(request.prompt_logprobs for requests in groups for request in requests):
            step = self._prompt_logprobs_step(bucket)
        else:
            absorbed = max(layout.absorbed_tokens for layout in layouts)
            step = self._step(bucket, absorbed, any(layout.has_expanded for layout in layouts))
        return StepLayout(layouts, step, rank_tokens.sum(0), rank_pairs.sum(0))

    def bucket(self, tokens: int) -> int:
        """The smallest bucket that holds `tokens` tokens on a rank."""
        for bucket in self.buckets:
            if tokens <= bucket:
                return bucket
        raise ValueError(
            f"a rank has {tokens} tokens; the largest bucket is {self.buckets[-1]}. Use a larger prefill_chunk."
        )

    @property
    def step_shapes(self) -> tuple[StepShape, ...]:
        """The shapes of all programs, rising in tokens; the last one is the largest."""
        shapes = [
            self._step(bucket, absorbed, expands)
            for bucket in self.buckets
            for absorbed, expands in ((0, False), (0, True), (bucket, True))
        ]
        return tuple(dict.fromkeys(shapes))

    @property
    def prompt_logprobs_shapes(self) -> tuple[StepShape, ...]:
        """The shapes of the programs that return prompt log-probabilities, one for each bucket: they are rare."""
        return tuple(self._prompt_logprobs_step(bucket) for bucket in self.buckets)

    def dummy_batch(self, step: StepShape, *, keeps_table: bool = False) -> Batch:
        """A batch of the shape without a request, on the host: to compile for.

        Args:
          keeps_table: for devices that keep the page table (`forward_from_slots`).
        """
        empty = lay_out(RequestColumns.of([], self.shape), self.shape, self.model.config)
        idle = np.zeros(self.shape.cp, np.int64)
        layout = StepLayout([empty] * self.shape.dp, step, idle, idle)
        update = TableMirror(self.shape).update(layout.columns, step) if keeps_table else None
        return build_batch(layout, self.shape, update)

    def _may_expand(self, bucket: int) -> bool:
        return self.shape.expanded_keys > 0 and (self.shape.form == "expanded" or bucket > _ABSORBED_ONLY)

    def _prompt_logprobs_step(self, bucket: int) -> StepShape:
        """The bucket's program that returns prompt log-probabilities: for any step that fits."""
        return dataclasses.replace(self._step(bucket, bucket, True), prompt_logprobs=True)

    def _step(self, bucket: int, absorbed: int, expands: bool) -> StepShape:
        """The program for a step with at most `absorbed` absorbed tokens on a rank."""
        if not expands or not self._may_expand(bucket):
            return StepShape(bucket, bucket, 0)
        few = min(_ABSORBED_ONLY, bucket)
        return StepShape(bucket, few if absorbed <= few else bucket, self.shape.expanded_keys)


def _buckets(chunk: int, requests: int, cp: int, decoded: int = 1) -> tuple[int, ...]:
    """Per rank, for decoding requests with up to `decoded` tokens each.

    The zigzag gives no rank more than 2 tokens over its share of a request that it divides, nor more than one request whole.
    """
    divided = chunk + (requests * decoded if decoded >= 2 * cp else 0)
    uneven = 0 if cp == 1 else 2 * min(requests, divided // (2 * cp)) + 2 * cp
    largest = -(-(chunk + requests * decoded) // cp) + uneven
    return tuple(sorted({-(-size // cp) for size in token_buckets(largest * cp)}))
