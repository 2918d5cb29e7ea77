"""The experts' product on Hopper GPUs: a persistent Pallas kernel over the tiles that hold rows.

After `jax.experimental.pallas.ops.gpu.ragged_dot_mgpu` (The JAX Authors, Apache-2.0), with the same pipeline and store. That
kernel visits M / 128 + E - 1 tiles whether or not rows are there and computes the empty ones in full, and every tile walks
through all groups to find its own. Here XLA makes a list of the tiles beforehand, and the kernel's loop ends with the list.
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
"""Rows and columns of an output tile: a warpgroup's accumulators are then half of its registers."""
STEP = 64
"""Columns of `rows` in a step of the pipeline: 128 bytes, the widest swizzle of the tensor cores' operands."""
_STEPS_IN_FLIGHT = 4  # 32 KB each, of 227
_COLUMN_TILES = 8  # the path over the tiles: 8 columns wide, so that 132 tiles at work share rows and weights in L2
_SMS = 132  # H100 and H200 SXM; another number costs time only


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
    m, k = rows.shape
    n = weights.shape[2]
    count, tiles = _list_tiles(group_sizes, m, first)
    column_tiles = n // TILE

    def body(count_ref: jax.Ref, tiles_ref: jax.Ref, rows_ref: jax.Ref, weights_ref: jax.Ref, out_ref: jax.Ref) -> None:
        num_tiles = count_ref[0]

        @plgpu.nd_loop((num_tiles * column_tiles,), collective_axes="sm")
        def _(loop: plgpu.NDLoopInfo) -> None:
            tile, column = plgpu.planar_snake(loop.index[0], (num_tiles, column_tiles), 1, _COLUMN_TILES)
            expert, block, first, size = (tiles_ref[i * tiles.shape[0] // 4 + tile] for i in range(4))

            def accumulate(acc_ref: Any) -> jax.Array:
                plgpu.emit_pipeline(
                    lambda _, a, b: plgpu.wgmma(acc_ref, a, b),
                    grid=(k // STEP,),
                    in_specs=[
                        plgpu.BlockSpec((TILE, STEP), lambda s: (block, s), delay_release=1),
                        plgpu.BlockSpec((STEP, TILE), lambda s: (s, column), delay_release=1),
                    ],
                    max_concurrent_steps=_STEPS_IN_FLIGHT,
                )(rows_ref, weights_ref.at[expert])
                return acc_ref[...]

            product = pl.run_scoped(accumulate, plgpu.WGMMAAccumulatorRef((TILE, TILE)))
            pl.run_scoped(
                lambda staged: _store(product, staged, out_ref, block, first, size, column),
                plgpu.SMEM((TILE, TILE), dtype=rows.dtype),
            )

    out = plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((m, n), rows.dtype),
        grid=(_SMS,),
        grid_names=("sm",),
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
    )(count, tiles, rows, weights)
    return vary_like(out, rows, weights, group_sizes)  # the kernel's own type says "equal on all devices"


def _store(
    product: jax.Array, staged: jax.Ref, out_ref: jax.Ref, block: jax.Array, first: jax.Array, size: jax.Array,
    column: jax.Array,
) -> None:  # fmt: skip
    """Writes `size` rows of a tile: the other rows are another expert's. Copies have static sizes: one for each bit of `size`."""
    staged[...] = product.astype(staged.dtype)
    plgpu.commit_smem()
    for bit in reversed(range(int(math.log2(TILE)) + 1)):

        @pl.when(size & (1 << bit) != 0)
        def _(at: jax.Array = first, length: int = 1 << bit) -> None:
            plgpu.copy_smem_to_gmem(
                staged.at[pl.ds(at, length)],
                out_ref.at[pl.ds(block * TILE + at, length), pl.ds(column * TILE, TILE)],
            )

        first += size & (1 << bit)
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)


def _list_tiles(
    group_sizes: Int32[Array, " E"], rows: int, first_group: Int32[Array, ""] | int
) -> tuple[Int32[Array, " 1"], Int32[Array, " 4*tiles"]]:
    """How many tiles hold rows; and of each one the weights, the block of rows, the first row in it, and the number of rows."""
    end = jnp.cumsum(group_sizes)
    start = end - group_sizes
    first_block = start // TILE
    tiles = jnp.where(group_sizes > 0, (end - 1) // TILE + 1 - first_block, 0)
    tile_end = jnp.cumsum(tiles)
    tile = jnp.arange(rows // TILE + len(group_sizes) - 1, dtype=jnp.int32)
    expert = jnp.minimum((tile_end <= tile[:, None]).sum(1, dtype=jnp.int32), len(group_sizes) - 1)
    block = first_block[expert] + tile - (tile_end - tiles)[expert]
    first = jnp.maximum(start[expert] - block * TILE, 0)
    size = jnp.minimum(end[expert] - block * TILE, TILE) - first
    return tile_end[-1:], lax.concatenate([first_group + expert, block, first, size], 0)
