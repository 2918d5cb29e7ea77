"""The grid of programs, and batches that fit it: what turns `Work` into arrays whose shapes repeat."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax

from jax_mla_cp import cache
from jax_mla_cp.batch import KEY_ALIGN, Batch, BatchShape, Work, build, check_works, lay_out
from jax_mla_cp.cache import CacheShape
from jax_mla_cp.config import ConfigError, Form
from jax_mla_cp.mesh import mesh_shape
from jax_mla_cp.model.handle import Model
from jax_mla_cp.step import put

_SMALLEST = 16
_FINE_FROM = 4096
_ABSORBED_ONLY = 128
"""Tokens per rank up to which no row gains by the expanded form (attention/form.py: the crossover against a long prefix
is at 171), so that these programs do without it."""


def token_buckets(most: int) -> tuple[int, ...]:
    """Sizes up to `most` tokens: doubling up to 4K, then at most 1/8 apart, because long steps are dear.

    >>> token_buckets(6000)
    (16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 4608, 5184, 5832, 6000)
    >>> token_buckets(2100)
    (16, 32, 64, 128, 256, 512, 1024, 2100)
    """
    sizes: list[int] = []
    size = _SMALLEST
    while size < most and not (size < _FINE_FROM and most <= size + size // 8):  # the last one does for it too
        sizes.append(size)
        size = 2 * size if size < _FINE_FROM else size + size // 8
    return (*sizes, most)


@dataclasses.dataclass(frozen=True)
class Planner:
    """Makes device-ready batches for one model and one cache.

    One program is compiled per bucket, a number of tokens in a rank's buffer; all other shapes are fixed.
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
        max_len: int | None = None,
        prefill_chunk: int | None = None,
        form: Form = "auto",
    ) -> Planner:
        """Fixes the shapes of all steps.

        Args:
          cache_tokens: tokens that a dp group's pages hold, rounded up to whole pages.
          page_size: tokens of a page.
          max_requests: requests in a step, per dp group.
          max_len: longest request, prompt and continuation; default: what the model and the cache allow.
          prefill_chunk: most new tokens in a step of a dp group, not counting the single ones of decoding requests;
            default: `max_len`.
          form: of attention. "auto" decides by shape; the others are for all requests but those with a single new token.

        Raises:
          ConfigError: sizes that are not positive, or a `max_len` beyond the model or the cache.
        """
        sizes = {"cache_tokens": cache_tokens, "page_size": page_size, "max_requests": max_requests, "max_len": max_len}
        for name, value in {**sizes, "prefill_chunk": prefill_chunk}.items():
            if value is not None and value < 1:
                raise ConfigError(f"{name} must be at least 1, got {value}.")
        if form not in ("auto", "expanded", "absorbed"):
            raise ConfigError(f"form must be auto, expanded or absorbed, got {form!r}.")
        mesh = mesh_shape(model.mesh)
        layout = CacheShape(model.config.num_layers, -(-cache_tokens // page_size), page_size)
        longest = min(model.config.max_position, layout.tokens)
        max_len = longest if max_len is None else max_len
        if max_len > longest:
            raise ConfigError(
                f"max_len={max_len} is more than {longest}: the model has {model.config.max_position} positions, "
                f"the cache holds {layout.tokens} tokens."
            )
        chunk = min(prefill_chunk or max_len, max_requests * max_len)
        keys = max_len + chunk + KEY_ALIGN
        shape = BatchShape(
            dp=mesh.dp,
            cp=mesh.cp,
            requests=-(-max_requests // mesh.cp) * mesh.cp,
            table_width=-(-max_len // page_size),
            expanded_keys=0 if form == "absorbed" else -(-keys // page_size) * page_size,
            cache=layout,
            form=form,
        )
        return cls(model, shape, _buckets(chunk, max_requests, mesh.cp))

    def new_cache(self) -> jax.Array:
        """An empty cache of the planned size."""
        return cache.create(self.model.config, self.shape.cache, self.model.build.dtype, self.model.mesh)

    def batch(self, works: Sequence[Work] | Sequence[Sequence[Work]]) -> Batch:
        """The arrays of a step, on the devices. Work i of dp group g is in row `g * shape.requests + i` of its results.

        Args:
          works: a list of works, or with dp > 1 one list per dp group.

        Raises:
          ValueError: a work that doesn't fit, with its index and what is allowed.
        """
        groups = [works] if not works or isinstance(works[0], Work) else works
        return put(self.model, self.host_batch(groups))  # type: ignore[arg-type]

    def host_batch(self, groups: Sequence[Sequence[Work]]) -> Batch:
        """`batch` before it goes to the devices: NumPy arrays, all devices' one after the other."""
        if len(groups) != self.shape.dp:
            raise ValueError(f"works: one list per dp group is needed, {self.shape.dp} of them, got {len(groups)}.")
        for works in groups:
            check_works(works, self.shape, self.model.config)
        shape = self._bucket_shape(0)
        layouts = [lay_out(works, shape, self.model.config) for works in groups]
        bucket = self.bucket(max(layout.tokens for layout in layouts))
        if self._bucket_shape(bucket) != shape:
            shape = self._bucket_shape(bucket)
            layouts = [lay_out(works, shape, self.model.config) for works in groups]
        return build(layouts, shape, bucket)

    def bucket(self, tokens: int) -> int:
        """The smallest bucket that holds so many tokens on a rank."""
        for bucket in self.buckets:
            if tokens <= bucket:
                return bucket
        raise ValueError(
            f"a rank has {tokens} tokens; the largest bucket is {self.buckets[-1]}. Use a larger prefill_chunk."
        )

    def sample_batch(self, bucket: int) -> Batch:
        """A batch of the bucket's shapes, with nothing in it, on the host: to compile for."""
        shape = self._bucket_shape(bucket)
        return build([lay_out([], shape, self.model.config)] * self.shape.dp, shape, bucket)

    def _bucket_shape(self, bucket: int) -> BatchShape:
        absorbed_only = self.shape.form == "auto" and bucket <= _ABSORBED_ONLY
        return dataclasses.replace(self.shape, expanded_keys=0) if absorbed_only else self.shape


def _buckets(chunk: int, requests: int, cp: int) -> tuple[int, ...]:
    """Per rank. The zigzag gives no rank more than 2 tokens over its share of a request, nor more than one request whole."""
    uneven = 0 if cp == 1 else 2 * min(requests, chunk // (2 * cp)) + 2 * cp
    largest = -(-(chunk + requests) // cp) + uneven
    return tuple(sorted({-(-size // cp) for size in token_buckets(largest * cp)}))
