"""The grid of programs, and batches that fit it: what turns `StepRequest` into arrays whose shapes repeat."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax

from jax_mla_cp import cache
from jax_mla_cp.attention import fa3
from jax_mla_cp.batch.arrays import Batch
from jax_mla_cp.batch.check import check_works
from jax_mla_cp.batch.columns import Columns
from jax_mla_cp.batch.form import Form
from jax_mla_cp.batch.layout import KEY_ALIGN, Layout, build, lay_out, packed_keys
from jax_mla_cp.batch.packing import Packed
from jax_mla_cp.batch.shapes import BatchShape, CacheShape, StepShape
from jax_mla_cp.batch.step_request import StepRequest
from jax_mla_cp.config.errors import ConfigError
from jax_mla_cp.mesh import mesh_shape
from jax_mla_cp.model.loaded_model import Model
from jax_mla_cp.step.forward import put

_SMALLEST = 16
_FINE_FROM = 4096
_ABSORBED_ONLY = 128
"""Tokens per rank up to which no row gains by the expanded form (attention/form.py: the crossover against a long prefix
is at 209), so that these programs do without it. And what a program with expanded rows leaves for absorbed ones, decoding
requests above all, without doing the absorbed form's products for the whole buffer."""

MOST_DRAFT_TOKENS = 4
"""The layer is trained to guess one token; what it guesses from its own guesses is right less and less often."""


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

    One program is compiled per `StepShape`: with `form="auto"` one for small buckets, and for the others one with expanded
    rows beside few absorbed tokens (the common one), one beside many, and one without expanded rows. Steps that score have
    a program for each bucket beside these.
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
        draft_tokens: int = 0,
    ) -> Planner:
        """Fixes the shapes of all steps.

        Args:
          cache_tokens: tokens that a dp group's pages hold, rounded up to whole pages.
          page_size: tokens of a page.
          max_requests: requests in a step, per dp group.
          max_len: longest request, prompt and continuation; default: what the model and the cache allow.
          prefill_chunk: most new tokens in a step of a dp group, not counting those of decoding requests (one, and
            drafts); default: `max_len`.
          form: of attention. "auto" decides by shape; the others are for all requests but decoding ones.
          draft_tokens: drafts that a step proposes and verifies for each request, with the model's MTP layer; 0: none.

        Raises:
          ConfigError: sizes that are not positive, a `max_len` beyond the model or the cache, or drafts without MTP layer.
        """
        if not 0 <= draft_tokens <= MOST_DRAFT_TOKENS:
            raise ConfigError(f"draft_tokens must be 0 to {MOST_DRAFT_TOKENS}, got {draft_tokens}.")
        if draft_tokens and not model.build.mtp:
            raise ConfigError(f"draft_tokens={draft_tokens} needs the MTP layer: load the model with mtp=True.")
        sizes = {"cache_tokens": cache_tokens, "page_size": page_size, "max_requests": max_requests, "max_len": max_len}
        for name, value in {**sizes, "prefill_chunk": prefill_chunk}.items():
            if value is not None and value < 1:
                raise ConfigError(f"{name} must be at least 1, got {value}.")
        if model.build.attention == "fa3" and page_size % fa3.PAGE_MULTIPLE:
            raise ConfigError(
                f"page_size={page_size}: FlashAttention-3 needs a multiple of {fa3.PAGE_MULTIPLE} (a tile of keys lies in "
                f"one page). Use --page-size {-(-page_size // fa3.PAGE_MULTIPLE) * fa3.PAGE_MULTIPLE}, or --attention xla."
            )
        if form not in ("auto", "expanded", "absorbed"):
            raise ConfigError(f"form must be auto, expanded or absorbed, got {form!r}.")
        mesh = mesh_shape(model.mesh)
        layout = CacheShape(model.build.cache_layers, -(-cache_tokens // page_size), page_size)
        longest = min(model.config.max_position, layout.tokens)
        max_len = longest if max_len is None else max_len
        if max_len > longest:
            raise ConfigError(
                f"max_len={max_len} is more than {longest}: the model has {model.config.max_position} positions, "
                f"the cache holds {layout.tokens} tokens."
            )
        chunk = min(prefill_chunk or max_len, max_requests * max_len)
        # One request's keys, all of them; of several, those that fit beside the longest (the others are absorbed).
        keys = max_len if max_requests == 1 else max_len + chunk + KEY_ALIGN
        shape = BatchShape(
            dp=mesh.dp,
            cp=mesh.cp,
            # Recycled drafts write one slot per request, and of a single slot, XLA's scatter may copy the cache.
            requests=-(-max(max_requests, min(draft_tokens, 2)) // mesh.cp) * mesh.cp,
            table_width=-(-max_len // page_size),
            expanded_keys=0 if form == "absorbed" else packed_keys(keys, page_size),
            cache=layout,
            form=form,
            draft_tokens=draft_tokens,
        )
        return cls(model, shape, _buckets(chunk, max_requests, mesh.cp, shape.samples))

    def new_cache(self) -> jax.Array:
        """An empty cache of the planned size."""
        build = self.model.build
        return cache.create(self.shape.cache, build.config.latent_dim, build.dtype, self.model.mesh)

    def batch(self, works: Sequence[StepRequest] | Sequence[Sequence[StepRequest]]) -> Packed:
        """The arrays of a step, on the devices. StepRequest i of dp group g is in row `g * shape.requests + i` of its results.

        Args:
          works: a list of works, or with dp > 1 one list per dp group.

        Raises:
          ValueError: a work that doesn't fit, with its index and what is allowed.
        """
        groups = [works] if not works or isinstance(works[0], StepRequest) else works
        # mypy does not conclude from the first item what the others are
        return put(self.model, self.host_batch(groups))  # type: ignore[arg-type]

    def host_batch(self, groups: Sequence[Sequence[StepRequest]]) -> Batch:
        """`batch` before it goes to the devices: NumPy arrays, all devices' one after the other."""
        layouts, step = self.lay_out(groups)
        return build(layouts, self.shape, step)

    def lay_out(self, groups: Sequence[Sequence[StepRequest]]) -> tuple[list[Layout], StepShape]:
        """A step's works, checked and divided over the ranks, one list of works per dp group; and the step they need."""
        if len(groups) != self.shape.dp:
            raise ValueError(f"works: one list per dp group is needed, {self.shape.dp} of them, got {len(groups)}.")
        columns = [Columns.of(works, self.shape) for works in groups]
        for works in columns:
            check_works(works, self.shape, self.model.config)
        layouts = [lay_out(works, self.shape, self.model.config, expand=False) for works in columns]
        bucket = self.bucket(max(layout.tokens for layout in layouts))
        if self._may_expand(bucket):
            layouts = [lay_out(works, self.shape, self.model.config) for works in columns]
        if any(work.score for works in groups for work in works):
            return layouts, self._scored(bucket)
        absorbed = max(layout.absorbed_tokens for layout in layouts)
        return layouts, self._step(bucket, absorbed, any(layout.expands for layout in layouts))

    def bucket(self, tokens: int) -> int:
        """The smallest bucket that holds so many tokens on a rank."""
        for bucket in self.buckets:
            if tokens <= bucket:
                return bucket
        raise ValueError(
            f"a rank has {tokens} tokens; the largest bucket is {self.buckets[-1]}. Use a larger prefill_chunk."
        )

    @property
    def steps(self) -> tuple[StepShape, ...]:
        """The shapes of all programs, rising in tokens; the last one is the largest."""
        steps = [
            self._step(bucket, absorbed, expands)
            for bucket in self.buckets
            for absorbed, expands in ((0, False), (0, True), (bucket, True))
        ]
        return tuple(dict.fromkeys(steps))

    @property
    def scored_steps(self) -> tuple[StepShape, ...]:
        """The shapes of the programs that score, one for each bucket: they are rare."""
        return tuple(self._scored(bucket) for bucket in self.buckets)

    def step_of(self, batch: Batch) -> StepShape:
        """The shape of a batch, not scored."""
        tokens = batch.tokens.shape[0] // (self.shape.dp * self.shape.cp)
        keys = batch.key_pages.shape[0] // self.shape.dp * self.shape.cache.page_size
        return StepShape(tokens, batch.absorbed_tokens, keys)

    def sample_batch(self, step: StepShape) -> Batch:
        """A batch of the shape, with nothing in it, on the host: to compile for."""
        nothing = lay_out(Columns.of([], self.shape), self.shape, self.model.config)
        return build([nothing] * self.shape.dp, self.shape, step)

    def _may_expand(self, bucket: int) -> bool:
        return self.shape.expanded_keys > 0 and (self.shape.form == "expanded" or bucket > _ABSORBED_ONLY)

    def _scored(self, bucket: int) -> StepShape:
        """The scoring program of a bucket: for any step that fits."""
        return dataclasses.replace(self._step(bucket, bucket, True), scored=True)

    def _step(self, bucket: int, absorbed: int, expands: bool) -> StepShape:
        """The program for a step with so many absorbed tokens on a rank."""
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
