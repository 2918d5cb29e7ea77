"""The paged latent cache: the only file that knows where a page lives.

One array `pages [dp * layers * pages_per_layer, page_size, R + r]`, sharded over dp and equal on every cp and tp rank.
It is flat over layers and carried through the layers' scan with an offset, because XLA updates this form in place (asserted on the
compiled step); a stacked `[layers, ...]` array, scanned over, is copied whole (tests/test_cache.py shows it).

A page holds `page_size` consecutive latents of one request, the same page id in every layer. A latent is a token's
normed compressed KV (`R`), then its roped shared key (`r`).

Ids outside the array are dropped on writing and read as zeros. Unused places of an id array hold ids past the end
of the *whole* array, so that they stay outside after any layer's offset.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float, Int32

from jax_mla_cp.batch.rows import Rows
from jax_mla_cp.batch.shapes import CacheShape
from jax_mla_cp.mesh import DP, mesh_shape

PAGES_SPEC = PartitionSpec(DP)


def create(shape: CacheShape, latent_dim: int, dtype: jax.typing.DTypeLike, mesh: Mesh | None = None) -> jax.Array:
    """An empty cache `[dp * layers * pages_per_layer, page_size, R + r]`, sharded P("dp")."""
    full = (mesh_shape(mesh).dp * shape.total_pages, shape.page_size, latent_dim)
    sharding = None if mesh is None else NamedSharding(mesh, PAGES_SPEC)
    return jax.jit(lambda: jnp.zeros(full, dtype), out_shardings=sharding)()


def page_bytes(layers: int, page_size: int, latent_dim: int, dtype: jax.typing.DTypeLike) -> int:
    """Bytes that one page takes on a device, over all layers."""
    return layers * page_size * latent_dim * jnp.dtype(dtype).itemsize


def shape_of(pages: Float[Array, "pages page_size C"], layers: int) -> CacheShape:
    """The shape of a device's part of a cache with that many layers."""
    return CacheShape(layers, pages.shape[0] // layers, pages.shape[1])


def write(
    pages: Float[Array, "pages page_size C"],
    latents: Float[Array, "M C"],
    slot_mapping: Int32[Array, " M"],
    pages_to_zero: Int32[Array, " Z"],
    layer: Int32[Array, ""],
    *,
    layers: int,
) -> Float[Array, "pages page_size C"]:
    """Writes latents in place: token m to slot `slot_mapping[m]` (see `CacheShape.slot_of`) of one of the cache's `layers`.

    `pages_to_zero` are pages of which this step writes the first tokens, but not all: they are zeroed first. A kernel multiplies
    what lies past a request's end by 0, and 0 * NaN is NaN, so memory that an earlier request left must not stay there.
    Order is free: the slot mapping carries the permutation. Slots and pages out of range are dropped.
    """
    shape = shape_of(pages, layers)
    pages = pages.at[pages_to_zero + layer * shape.pages_per_layer].set(0, mode="drop", unique_indices=True)
    flat = pages.reshape(-1, pages.shape[2])
    flat = flat.at[slot_mapping + layer * shape.tokens].set(
        latents.astype(pages.dtype), mode="drop", unique_indices=True
    )
    return flat.reshape(pages.shape)


def slots_at(
    pages: Float[Array, "pages page_size C"],
    page_table: Int32[Array, "I W"],
    row: Int32[Array, " I"],
    position: Int32[Array, " I"],
    valid: Bool[Array, " I"],
    *,
    layers: int,
) -> Int32[Array, " I"]:
    """The slot of one position of each request, whose pages are in `page_table[row]`; where not `valid`, a slot out of range."""
    shape = shape_of(pages, layers)
    page = page_table[row, jnp.where(valid, position // shape.page_size, 0)]
    return jnp.where(valid, shape.slot_of(page, position % shape.page_size), shape.unused_slots(len(position)))


def row_pages(
    pages: Float[Array, "pages page_size C"], page_table: Int32[Array, "I W"], rows: Rows
) -> Int32[Array, "B W"]:
    """Each row's pages, in order; past its last key ids out of range, whatever the table holds there.

    A table that stays on the devices still holds pages of requests that have ended. Attention uses nothing past a row's last key;
    this keeps another request's latents out of its reach, as a table of the step's own does.
    """
    used = -(-rows.kv_len // pages.shape[1])
    return jnp.where(jnp.arange(page_table.shape[1]) < used[:, None], page_table[rows.request], pages.shape[0])


def layer_pages(
    pages: Float[Array, "pages page_size C"], page_ids: Int32[Array, "*I"], layer: Int32[Array, ""], *, layers: int
) -> Int32[Array, "*I"]:
    """The pages of one layer with these ids, for `read` and for attention calls that read the pages themselves."""
    return page_ids + layer * shape_of(pages, layers).pages_per_layer


def read(pages: Float[Array, "pages page_size C"], page_ids: Int32[Array, " K"]) -> Float[Array, "K*page_size C"]:
    """The latents of pages, one after the other. Pages out of range are zeros."""
    latents = pages.at[page_ids].get(mode="fill", fill_value=0)
    return lax.collapse(latents, 0, 2)
