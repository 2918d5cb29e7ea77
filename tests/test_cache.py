"""The paged cache: writes land where they should and nowhere else, and the compiled step never copies it."""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_mla_cp import cache
from jax_mla_cp.batch.shapes import CacheShape
from jax_mla_cp.config.errors import ConfigError

SHAPE = CacheShape(layers=3, pages_per_layer=5, page_size=4)


def test_write_lands_in_its_slots_of_its_layer_only() -> None:
    before = np.random.default_rng(0).normal(size=(15, 4, 2)).astype(np.float32)
    latents = np.arange(10, dtype=np.float32).reshape(5, 2) + 100
    slots = np.concatenate([[7, 4, 19], SHAPE.unused_slots(2)]).astype(np.int32)  # the last two tokens are padding
    pages_to_zero = np.concatenate([[4], SHAPE.unused_pages(1)]).astype(np.int32)
    for layer in range(3):
        arrays = (jnp.asarray(x) for x in (before, latents, slots, pages_to_zero, layer))
        after = np.asarray(cache.write(*arrays, layers=3))
        expect = before.copy().reshape(3, 5, 4, 2)
        expect[layer, 4] = 0
        for slot, latent in zip(slots[:3], latents, strict=False):
            expect[layer, slot // 4, slot % 4] = latent
        np.testing.assert_array_equal(after, expect.reshape(before.shape))


def test_out_of_range_reads_are_zeros_in_every_layer() -> None:
    pages = jnp.ones((15, 4, 2))
    ids = cache.layer_pages(pages, jnp.asarray(SHAPE.unused_pages(3)), jnp.int32(2), layers=3)
    assert not np.asarray(cache.read(pages, ids)).any()
    ids = cache.layer_pages(pages, jnp.array([4]), jnp.int32(2), layers=3)
    assert np.asarray(cache.read(pages, ids)).all()


def test_slots_at_positions() -> None:
    """The slot of a position in its page, as `write` takes it; where not valid, different slots of no layer."""
    pages = jnp.zeros((15, 4, 2))
    table = jnp.array([[0, 2, 99], [99, 99, 99], [3, 1, 99], [4, 99, 99], [1, 99, 99]], jnp.int32)
    row = jnp.array([2, 0, 3, 4], jnp.int32)
    position, valid = jnp.array([5, 3, 2, 7], jnp.int32), jnp.array([True, True, False, False])
    slots = np.asarray(cache.slots_at(pages, table, row, position, valid, layers=3))
    assert slots.dtype == np.int32
    assert slots[:2].tolist() == [1 * 4 + 1, 0 * 4 + 3]
    assert slots[2] != slots[3] and (slots[2:] >= 15 * 4).all()


def test_ids_stay_int32() -> None:
    with pytest.raises(ConfigError, match="kv_pages: 200000 pages of 64 tokens x 61 layers"):
        CacheShape(layers=61, pages_per_layer=200_000, page_size=64)


@pytest.mark.parametrize("bad", [{"layers": 0}, {"pages_per_layer": 0}, {"page_size": 0}])
def test_refuses_empty_shapes(bad: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match=f"{next(iter(bad))}: must be at least 1, got 0"):
        CacheShape(**{"layers": 1, "pages_per_layer": 1, "page_size": 1, **bad})


def copies_of(text: str, shape: tuple[int, ...]) -> list[str]:
    """Copy instructions of an array of that shape, flat over pages or not, in a compiled program's text."""
    pages, page_size, latent = shape
    forms = (f"{pages},{page_size},{latent}", f"{pages * page_size},{latent}")
    pattern = rf"= \w+\[(?:{'|'.join(forms)})\]\S* copy(?:-start)?\("
    return [line.strip()[:160] for line in text.splitlines() if re.search(pattern, line)]


def test_a_step_without_donation_is_seen_to_copy() -> None:
    """Negative control of the aliasing test in tests/step/test_forward.py: the same search finds the copy there."""

    def write(pages: jax.Array) -> jax.Array:
        return pages.at[jnp.array([3])].set(1.0)

    pages = jax.ShapeDtypeStruct((64, 8, 32), jnp.float32)
    kept = jax.jit(write).lower(pages).compile()
    donated = jax.jit(write, donate_argnums=0).lower(pages).compile()
    assert copies_of(kept.as_text(), (64, 8, 32))
    assert not copies_of(donated.as_text(), (64, 8, 32))
