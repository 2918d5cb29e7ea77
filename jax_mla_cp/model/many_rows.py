"""The experts' product on Hopper GPUs: a persistent Pallas kernel over the tiles that hold rows.

After `jax.experimental.pallas.ops.gpu.hopper_matmul_mgpu` and `ragged_dot_mgpu` (The JAX Authors, Apache-2.0): the first one's
warpgroups (one loads, two multiply), the second one's stores of any number of rows. `ragged_dot_mgpu` visits M / 128 + E - 1
tiles whether or not rows are there, and every tile walks through all groups to find its own. Here XLA makes a list of the tiles
beforehand, and the kernel's loop ends with the list.

The warpgroup that loads runs through all steps of all tiles without a break, so while a tile is stored, the next one's operands
arrive. And the two that multiply are held together by nothing but the buffers: while one of them stores, the other one has the
tensor cores to itself.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int32

from jax_mla_cp.mesh import vary_like

TILE = 128
"""Rows of an output tile; its columns are a multiple of it."""
STEP = 64
"""Columns of `rows` and `weights` in a step of the pipeline: 128 bytes, the widest swizzle of the tensor cores' operands."""
_SMS = 132  # H100 and H200 SXM; another number costs time only


# Measured on an H100 and an H200; none of these changes a result.
_COLUMNS = 256  # of an output tile: twice as many as rows need a quarter less of L2's bandwidth than a square
_STEPS = {256: 4, 128: 5}  # in flight: 16 KB of rows and 32 or 16 KB of weights each, of the 227 KB that a CTA may have
_STAGED = 64  # columns of a tile that a warpgroup stages for storing at a time: 128 bytes, one swizzled row
_SLOTS = 2  # in which it does so
_PATH = 8  # column tiles: the width of the path over the tiles, so that 132 tiles at work share rows and weights in L2


def fits(rows: jax.Array, weights: jax.Array) -> bool:
    """True if the kernel takes these dtypes and sizes."""
    _, n, k = weights.shape
    return rows.dtype == weights.dtype == jnp.bfloat16 and k % STEP == 0 and n % TILE == 0


def many_rows_matmul(
    rows: Float[Array, "M K"],
    weights: Float[Array, "G N K"],
    group_sizes: Int32[Array, " E"],
    first: Int32[Array, ""] | int = 0,
) -> Float[Array, "M N"]:
    """As `grouped_matmul`, for operands that fit. Rows past all groups are not written."""
    used = rows.shape[0]
    rows = jnp.pad(rows, ((0, -used % TILE), (0, 0)))
    (m, k), n = rows.shape, weights.shape[1]
    width = _COLUMNS if n % _COLUMNS == 0 else TILE
    in_flight, steps = _STEPS[width], k // STEP
    count, tiles = _list_tiles(group_sizes, m, first)
    length, column_tiles = tiles.shape[0] // 4, n // width
    half = TILE // 2  # rows of each multiplying warpgroup

    def body(count_ref: jax.Ref, tiles_ref: jax.Ref, rows_ref: jax.Ref, weights_ref: jax.Ref, out_ref: jax.Ref) -> None:
        num_tiles = count_ref[0]
        wg = lax.axis_index("wg")

        def tile_at(index: jax.Array) -> tuple[jax.Array, ...]:
            """A tile's group, block of rows, first row in the block, number of rows, and column of tiles."""
            tile, column = plgpu.planar_snake(index, (num_tiles, column_tiles), 1, _PATH)
            group, block, first, size = (tiles_ref[i * length + tile] for i in range(4))
            return group, block, first, size, column

        def scope(a: jax.Ref, b: jax.Ref, staged: jax.Ref, full: jax.Ref, empty: jax.Ref) -> None:
            def load() -> None:
                plgpu.set_max_registers(40, action="decrease")

                @plgpu.nd_loop((num_tiles * column_tiles,), collective_axes="sm", init_carry=jnp.int32(0))
                def loaded(loop: plgpu.NDLoopInfo, carry: jax.Array) -> jax.Array:
                    group, block, _, _, column = tile_at(loop.index[0])

                    def step(s: jax.Array, done: jax.Array) -> jax.Array:
                        slot = lax.rem(done, jnp.int32(in_flight))

                        @pl.when(done >= in_flight)
                        def _() -> None:
                            plgpu.barrier_wait(empty.at[slot])

                        plgpu.copy_gmem_to_smem(
                            rows_ref.at[pl.ds(block * TILE, TILE), pl.ds(s * STEP, STEP)],
                            a.at[slot],
                            full.at[slot],
                        )
                        plgpu.copy_gmem_to_smem(
                            weights_ref.at[group, pl.ds(column * width, width), pl.ds(s * STEP, STEP)],
                            b.at[slot],
                            full.at[slot],
                        )
                        return done + 1

                    return lax.fori_loop(0, steps, step, carry)

                # Mosaic wants every phase of a barrier to be waited for.
                @pl.loop(jnp.maximum(loaded - in_flight, 0), loaded)
                def _(done: jax.Array) -> None:
                    plgpu.barrier_wait(empty.at[lax.rem(done, jnp.int32(in_flight))])

            def compute() -> None:
                plgpu.set_max_registers(232, action="increase")
                row = wg * half

                @plgpu.nd_loop((num_tiles * column_tiles,), collective_axes="sm", init_carry=jnp.int32(0))
                def _(loop: plgpu.NDLoopInfo, carry: jax.Array) -> jax.Array:
                    _, block, first, size, column = tile_at(loop.index[0])

                    def accumulate(acc: Any) -> jax.Array:
                        def step(s: jax.Array, done: jax.Array) -> jax.Array:
                            slot = lax.rem(done, jnp.int32(in_flight))
                            plgpu.barrier_wait(full.at[slot])
                            plgpu.wgmma(acc, a.at[slot, pl.ds(row, half)], plgpu.transpose_ref(b.at[slot], (1, 0)))
                            plgpu.wgmma_wait(0)
                            plgpu.barrier_arrive(empty.at[slot])
                            return done + 1

                        lax.fori_loop(0, steps, step, carry)
                        return acc[...].astype(rows.dtype)

                    product = pl.run_scoped(accumulate, plgpu.WGMMAAccumulatorRef((half, width)))
                    for i, c in enumerate(range(0, width, _STAGED)):
                        plgpu.wait_smem_to_gmem(_SLOTS - 1, wait_read_only=True)
                        slot = staged.at[wg, i % _SLOTS]
                        slot[...] = product[:, c : c + _STAGED]
                        plgpu.commit_smem()
                        _store(slot, out_ref, block * TILE, row, first, size, pl.ds(column * width + c, _STAGED))
                    return carry + steps

                plgpu.wait_smem_to_gmem(0, wait_read_only=True)

            lax.cond(wg == 2, load, compute)

        def swizzled(tile_rows: int, columns: int) -> tuple[plgpu.TilingTransform, plgpu.SwizzleTransform]:
            swizzle = plgpu.find_swizzle(columns * 16)
            return plgpu.TilingTransform((tile_rows, swizzle // 2)), plgpu.SwizzleTransform(swizzle)

        pl.run_scoped(
            scope,
            plgpu.SMEM((in_flight, TILE, STEP), rows.dtype, transforms=swizzled(8, STEP)),
            plgpu.SMEM((in_flight, width, STEP), rows.dtype, transforms=swizzled(8, STEP)),
            # Tiles of one row, as a slice of any rows is stored. The bytes lie where they would with tiles of 8.
            plgpu.SMEM((2, _SLOTS, half, _STAGED), rows.dtype, transforms=swizzled(1, _STAGED)),
            plgpu.Barrier(num_arrivals=2, num_barriers=in_flight),
            plgpu.Barrier(num_arrivals=2, num_barriers=in_flight),
            collective_axes="wg",
        )

    out = plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((m, n), rows.dtype),
        grid=(_SMS,),
        grid_names=("sm",),
        num_threads=3,
        thread_name="wg",
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
    )(count, tiles, rows, weights)
    return vary_like(out, rows, weights, group_sizes)[:used]  # the kernel's own type says "equal on all devices"


def _store(
    staged: Any,
    out_ref: jax.Ref,
    block_row: jax.Array,
    row: jax.Array | int,
    first: jax.Array,
    size: jax.Array,
    columns: Any,
) -> None:
    """Writes the group's rows of a block, `size` from `first` on, as far as they are in `staged`, which begins at `row`."""
    max_rows = staged.shape[0]
    low = jnp.clip(first - row, 0, max_rows)
    size = jnp.clip(first + size - row, 0, max_rows) - low

    @pl.when(size == max_rows)
    def _() -> None:
        plgpu.copy_smem_to_gmem(staged, out_ref.at[pl.ds(block_row + row, max_rows), columns], commit_group=False)

    @pl.when(size < max_rows)
    def _() -> None:
        at = low
        for bit in reversed(range(int(math.log2(max_rows)))):  # copies have static sizes: one for each bit of `size`

            @pl.when(size & (1 << bit) != 0)
            def _(at: jax.Array = at, length: int = 1 << bit) -> None:
                plgpu.copy_smem_to_gmem(
                    staged.at[pl.ds(at, length)],
                    out_ref.at[pl.ds(block_row + row + at, length), columns],
                    commit_group=False,
                )

            at += size & (1 << bit)

    plgpu.commit_smem_to_gmem_group()  # one for any number of copies, as a slot's next user counts groups


def _list_tiles(
    group_sizes: Int32[Array, " E"], rows: int, first_group: Int32[Array, ""] | int
) -> tuple[Int32[Array, " 1"], Int32[Array, " 4*tiles"]]:
    """Returns the number of tiles with rows; and each tile's group, block of rows, first row in the block, and number of rows."""
    end = jnp.cumsum(group_sizes)
    start = end - group_sizes
    first_block = start // TILE
    tiles = jnp.where(group_sizes > 0, (end - 1) // TILE - first_block + 1, 0)
    tile_end = jnp.cumsum(tiles)
    tile = jnp.arange(rows // TILE + len(group_sizes) - 1, dtype=jnp.int32)
    expert = jnp.minimum((tile_end <= tile[:, None]).sum(1, dtype=jnp.int32), len(group_sizes) - 1)
    block = first_block[expert] + tile - (tile_end - tiles)[expert]
    first = jnp.maximum(start[expert] - block * TILE, 0)
    size = jnp.minimum(end[expert] - block * TILE, TILE) - first
    return tile_end[-1:], lax.concatenate([first_group + expert, block, first, size], 0)
