// The walk over groups whose sizes are on the device: each group's rows in tiles, and a ring of stages to load them.
#pragma once

#include <cstdint>

#include "../shapes.h"
#include "../warp.h"

namespace mla {

constexpr int kWarpgroup = 128;
constexpr int kSmemBytes = 227 << 10;  // that a CTA may have

// Outputs of one group's matrix times rows of its: all ranks of a cluster share it.
struct Tile {
  int matrix, row, rows, output;
};

// The groups' rows and tiles of rows, in shared memory.
struct Groups {
  int count, first_matrix, row_tiles, row_begin[kMaxGroups + 1], tile_end[kMaxGroups];

  // Lists them. One warp.
  __device__ void List(const int32_t* sizes, int groups, int tile_rows, const int32_t* first) {
    int lane = threadIdx.x % kWarp, rows = 0, tiles = 0;
    for (int begin = 0; begin < groups; begin += kWarp) {
      int group = begin + lane, size = group < groups ? sizes[group] : 0;
      int row_sum = size, tile_sum = (size + tile_rows - 1) / tile_rows;
      for (int i = 1; i < kWarp; i *= 2) {
        int other_rows = __shfl_up_sync(~0u, row_sum, i), other_tiles = __shfl_up_sync(~0u, tile_sum, i);
        if (lane >= i) {
          row_sum += other_rows;
          tile_sum += other_tiles;
        }
      }
      if (group < groups) {
        row_begin[group] = rows + row_sum - size;
        tile_end[group] = tiles + tile_sum;
      }
      rows += __shfl_sync(~0u, row_sum, kWarp - 1);
      tiles += __shfl_sync(~0u, tile_sum, kWarp - 1);
    }
    if (lane == 0) {
      count = groups;
      first_matrix = *first;
      row_tiles = tiles;
      row_begin[groups] = rows;
    }
  }

  __device__ Tile TileAt(int row_tile, int tile_rows, int output) const {
    int low = 0, high = count - 1;
    while (low < high) {  // the first group that ends after row_tile
      int middle = (low + high) / 2;
      if (tile_end[middle] > row_tile) {
        high = middle;
      } else {
        low = middle + 1;
      }
    }
    int before = low == 0 ? 0 : tile_end[low - 1];
    int row = row_begin[low] + (row_tile - before) * tile_rows;
    return {first_matrix + low, row, min(tile_rows, row_begin[low + 1] - row), output};
  }
};

// A place in the ring of stages, and the parity of its barriers' phase.
template <int kStages>
struct Ring {
  int stage = 0, parity = 0;
  __device__ void Next() {
    if (++stage == kStages) {
      stage = 0;
      parity ^= 1;
    }
  }
  __device__ void Advance(int n) {
    stage += n;
    while (stage >= kStages) {
      stage -= kStages;
      parity ^= 1;
    }
  }
};

}  // namespace mla
