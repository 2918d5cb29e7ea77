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

import dataclasses
import math
from typing import Literal

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int32

from jax_mla_cp.mesh import vary_like

TILE = 128
"""Rows of an output tile, and what its columns are a multiple of."""
STEP = 64
"""Columns of `rows` in a step of the pipeline: 128 bytes, the widest swizzle of the tensor cores' operands."""
_ATOM = 64  # rows of a wgmma instruction, so of the smallest part of a product that can be taken from the registers
_SMS = 132  # H100 and H200 SXM; another number costs time only


@dataclasses.dataclass(frozen=True)
class Tuning:
    """What changes the kernel's speed only."""

    columns: int = 256
    """Of an output tile. Twice as many as rows: the operands that a product needs are a quarter less, of L2's bandwidth."""
    split: Literal["rows", "columns"] = "rows"
    """What of a tile the two warpgroups divide."""
    steps: int = 4
    """Of the pipeline, in flight: 16 KB of rows and 32 KB of weights each."""
    delay: int = 0
    """Whether a step's buffers are given back one step later, so that a warpgroup always has a product waiting."""
    path: int = 8
    """How many columns of tiles wide the path over the tiles is, so that 132 tiles at work share rows and weights in L2."""
    share: Literal["rows", "weights"] | None = None
    """What two CTAs (a cluster) load together: they have neighbouring columns, or neighbouring rows, of a group."""
    staged: int = 64
    """Columns of a tile that a warpgroup stages for storing at a time: 128 bytes, one swizzled row."""
    slots: int = 2
    """In which it does so."""

    @property
    def shared_memory(self) -> int:
        """Bytes, of the 227 KB that a CTA may have, besides the barriers' few."""
        return 2 * (self.steps * STEP * (TILE + self.columns) + 2 * self.slots * _ATOM * self.staged)


def fits(rows: jax.Array, weights: jax.Array) -> bool:
    """Whether these are the kernel's dtype and sizes. The number of rows is the caller's to round up."""
    _, k, n = weights.shape
    return rows.dtype == weights.dtype == jnp.bfloat16 and k % STEP == 0 and n % TILE == 0


def hopper_grouped_matmul(
    rows: Float[Array, "M K"],
    weights: Float[Array, "G K N"],
    group_sizes: Int32[Array, " E"],
    first: Int32[Array, ""] | int = 0,
) -> Float[Array, "M N"]:
    """As `grouped_matmul`: M and N multiples of TILE, K of STEP. Rows past all groups are not written."""
    return multiply(rows, weights, group_sizes, first, _tuned(weights.shape[2]))


def _tuned(n: int) -> Tuning:
    return Tuning() if n % 256 == 0 else Tuning(columns=128, steps=5)


def multiply(
    rows: Float[Array, "M K"],
    weights: Float[Array, "G K N"],
    group_sizes: Int32[Array, " E"],
    first: Int32[Array, ""] | int,
    tuning: Tuning,
) -> Float[Array, "M N"]:
    """`hopper_grouped_matmul` with the given tuning, which must divide N."""
    (m, k), n, t = rows.shape, weights.shape[2], tuning
    cluster = 1 if t.share is None else 2
    blocks = 2 if t.share == "weights" else 1  # of an entry in the list
    count, tiles = _list_tiles(group_sizes, m, first, blocks)
    length = tiles.shape[0] // 4
    column_tiles = n // t.columns * blocks // cluster
    steps = k // STEP
    part = (TILE // 2, t.columns) if t.split == "rows" else (TILE, t.columns // 2)  # a warpgroup's

    def body(count_ref: jax.Ref, tiles_ref: jax.Ref, rows_ref: jax.Ref, weights_ref: jax.Ref, out_ref: jax.Ref) -> None:
        num_tiles = count_ref[0]
        wg = lax.axis_index("wg")
        cta = lax.axis_index("cta")

        def place(index: jax.Array) -> tuple[jax.Array, ...]:
            """A tile's weights, block of rows, first row in the block (perhaps below 0), number of rows, and column of tiles."""
            tile, column = plgpu.planar_snake(index, (num_tiles, column_tiles), 1, t.path)
            group, block, first, size = (tiles_ref[i * length + tile] for i in range(4))
            if t.share == "rows":
                column = column * 2 + cta
            if t.share == "weights":
                block, first = block + cta, first - cta * TILE
            return group, block, first, size, column

        def scope(a: jax.Ref, b: jax.Ref, staged: jax.Ref, full: jax.Ref, empty: jax.Ref) -> None:
            def load() -> None:
                plgpu.set_max_registers(40, action="decrease")

                @plgpu.nd_loop((num_tiles * column_tiles,), collective_axes="sm", init_carry=jnp.int32(0))
                def loaded(loop: plgpu.NDLoopInfo, carry: jax.Array) -> jax.Array:
                    group, block, _, _, column = place(loop.index[0])
                    if t.share == "weights":
                        block = jnp.minimum(block, m // TILE - 1)  # the second block of a group's last entry

                    def step(s: jax.Array, done: jax.Array) -> jax.Array:
                        slot = lax.rem(done, jnp.int32(t.steps))

                        @pl.when(done >= t.steps)
                        def _() -> None:
                            plgpu.barrier_wait(empty.at[slot])

                        plgpu.copy_gmem_to_smem(
                            rows_ref.at[pl.ds(block * TILE, TILE), pl.ds(s * STEP, STEP)],
                            a.at[slot],
                            full.at[slot],
                            collective_axes="cta" if t.share == "rows" else None,
                        )
                        plgpu.copy_gmem_to_smem(
                            weights_ref.at[group, pl.ds(s * STEP, STEP), pl.ds(column * t.columns, t.columns)],
                            b.at[slot],
                            full.at[slot],
                            collective_axes="cta" if t.share == "weights" else None,
                        )
                        return done + 1

                    return lax.fori_loop(0, steps, step, carry)

                # A CTA must not end while its cluster's other one still writes to its barriers.
                @pl.loop(jnp.maximum(loaded - t.steps, 0), loaded)
                def _(done: jax.Array) -> None:
                    plgpu.barrier_wait(empty.at[lax.rem(done, jnp.int32(t.steps))])

            def compute() -> None:
                plgpu.set_max_registers(232, action="increase")
                row, col = (wg * part[0], 0) if t.split == "rows" else (0, wg * part[1])

                @plgpu.nd_loop((num_tiles * column_tiles,), collective_axes="sm", init_carry=jnp.int32(0))
                def _(loop: plgpu.NDLoopInfo, carry: jax.Array) -> jax.Array:
                    _, block, first, size, column = place(loop.index[0])

                    def accumulate(acc: jax.Ref) -> jax.Array:
                        def step(s: jax.Array, done: jax.Array) -> jax.Array:
                            slot = lax.rem(done, jnp.int32(t.steps))
                            plgpu.barrier_wait(full.at[slot])
                            plgpu.wgmma(
                                acc, a.at[slot, pl.ds(row, part[0])], b.at[slot, :, pl.ds(col, part[1])]
                            )
                            plgpu.wgmma_wait(t.delay)
                            if t.delay:

                                @pl.when(s > 0)
                                def _() -> None:
                                    plgpu.barrier_arrive(empty.at[lax.rem(done - 1, jnp.int32(t.steps))])
                            else:
                                plgpu.barrier_arrive(empty.at[slot])
                            return done + 1

                        done = lax.fori_loop(0, steps, step, carry)
                        product = acc[...].astype(rows.dtype)
                        if t.delay:
                            plgpu.barrier_arrive(empty.at[lax.rem(done - 1, jnp.int32(t.steps))])
                        return product

                    product = pl.run_scoped(accumulate, plgpu.ACC(part, jnp.float32))
                    i = 0
                    for r in range(0, part[0], _ATOM):
                        for c in range(0, part[1], t.staged):
                            plgpu.wait_smem_to_gmem(t.slots - 1, wait_read_only=True)
                            slot = staged.at[wg, i % t.slots]
                            slot[...] = product[r : r + _ATOM, c : c + t.staged]
                            plgpu.commit_smem()
                            out_columns = pl.ds(column * t.columns + col + c, t.staged)
                            _store(slot, out_ref, block * TILE, row + r, first, size, out_columns)
                            i += 1
                    return carry + steps

                plgpu.wait_smem_to_gmem(0, wait_read_only=True)

            lax.cond(wg == 2, load, compute)

        def swizzled(tile_rows: int, columns: int) -> tuple[plgpu.TilingTransform, plgpu.SwizzleTransform]:
            swizzle = plgpu.find_swizzle(columns * 16)
            return plgpu.TilingTransform((tile_rows, swizzle // 2)), plgpu.SwizzleTransform(swizzle)

        if t.share is None:
            empty = plgpu.Barrier(num_arrivals=2, num_barriers=t.steps)
        else:
            empty = plgpu.ClusterBarrier(collective_axes=("cta",), num_arrivals=2, num_barriers=t.steps)
        pl.run_scoped(
            scope,
            plgpu.SMEM((t.steps, TILE, STEP), rows.dtype, transforms=swizzled(8, STEP)),
            plgpu.SMEM((t.steps, STEP, t.columns), rows.dtype, transforms=swizzled(8, t.columns)),
            # Tiles of one row, as a slice of any rows is stored. The bytes lie where they would with tiles of 8.
            plgpu.SMEM((2, t.slots, _ATOM, t.staged), rows.dtype, transforms=swizzled(1, t.staged)),
            plgpu.Barrier(num_arrivals=2, num_barriers=t.steps),
            empty,
            collective_axes="wg",
        )

    out = plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((m, n), rows.dtype),
        grid=(_SMS // cluster,),
        grid_names=("sm",),
        cluster=(cluster,),
        cluster_names=("cta",),
        num_threads=3,
        thread_name="wg",
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
    )(count, tiles, rows, weights)
    return vary_like(out, rows, weights, group_sizes)  # the kernel's own type says "equal on all devices"


def _store(
    staged: jax.Ref, out_ref: jax.Ref, block_row: jax.Array, row: jax.Array | int, first: jax.Array, size: jax.Array,
    columns: pl.Slice,
) -> None:  # fmt: skip
    """Writes those of a block's rows from `row` on that the group has: `size` from `first` on. The others are another's."""
    low = jnp.clip(first - row, 0, _ATOM)
    size = jnp.clip(first + size - row, 0, _ATOM) - low

    @pl.when(size == _ATOM)
    def _() -> None:
        plgpu.copy_smem_to_gmem(staged, out_ref.at[pl.ds(block_row + row, _ATOM), columns], commit_group=False)

    @pl.when(size < _ATOM)
    def _() -> None:
        at = low
        for bit in reversed(range(int(math.log2(_ATOM)))):  # copies have static sizes: one for each bit of `size`

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
    group_sizes: Int32[Array, " E"], rows: int, first_group: Int32[Array, ""] | int, blocks: int = 1
) -> tuple[Int32[Array, " 1"], Int32[Array, " 4*tiles"]]:
    """How many tiles hold rows; and of each one the weights, the block of rows, the first row in it, and the number of rows.

    A tile is `blocks` blocks of TILE rows, from the one on in which the group begins.
    """
    end = jnp.cumsum(group_sizes)
    start = end - group_sizes
    first_block = start // TILE
    tiles = jnp.where(group_sizes > 0, ((end - 1) // TILE - first_block) // blocks + 1, 0)
    tile_end = jnp.cumsum(tiles)
    tile = jnp.arange(rows // TILE + len(group_sizes) - 1, dtype=jnp.int32)
    expert = jnp.minimum((tile_end <= tile[:, None]).sum(1, dtype=jnp.int32), len(group_sizes) - 1)
    block = first_block[expert] + (tile - (tile_end - tiles)[expert]) * blocks
    first = jnp.maximum(start[expert] - block * TILE, 0)
    size = jnp.minimum(end[expert] - block * TILE, TILE * blocks) - first
    return tile_end[-1:], lax.concatenate([first_group + expert, block, first, size], 0)
