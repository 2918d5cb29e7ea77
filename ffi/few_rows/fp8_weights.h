// FP8 weights on their way from shared memory to the tensor cores: bfloat16 fragments in registers, and scales.
#pragma once

#include <cstdint>

#include "config.h"
#include "ptx.h"

namespace mla::few_rows {

// Bytes of e4m3 to bfloat16: `low` gets bytes 0 and 2, `high` 1 and 3. Sign, exponent and mantissa are put where
// bfloat16 has them; a product with 2^(127 - 7) corrects the exponent, of subnormal numbers too. No NaN: the loader
// refuses them.
__device__ inline void Widen(uint32_t bytes, uint32_t& low, uint32_t& high) {
  constexpr uint32_t kSign = 0x80008000, kRest = 0x07f007f0, kBias = 0x7b807b80;
  low = Times((bytes << 8 & kSign) | (bytes << 4 & kRest), kBias);
  high = Times((bytes & kSign) | (bytes >> 4 & kRest), kBias);
}

// A warp's part of a stage's FP8 weights, as bfloat16 fragments of eight wgmma instructions.
using Fragments = uint32_t[8][4];

template <typename C>
__device__ void LoadFragments(const uint8_t* stage, const uint32_t (&group_scale)[4][2], Fragments& fragments) {
  int warpgroup = threadIdx.x / kWarpgroup, warp = threadIdx.x % kWarpgroup / kWarp, lane = threadIdx.x % kWarp;
  int row = warp * 16 + lane % 16;  // whose address this lane gives to ldmatrix
  uint32_t address = Shared(stage) + ((C::kSplits == 1 ? warpgroup * 64 : 0) + row) * kSwizzle;
  uint32_t bytes[4][4];
#pragma unroll
  for (int pair = 0; pair < 4; ++pair) LoadMatrices(address + ((2 * pair + lane / 16) ^ (row % 8)) * 16, bytes[pair]);
#pragma unroll
  for (int pair = 0; pair < 4; ++pair) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      uint32_t (&f)[4] = fragments[2 * pair + i];
      Widen(bytes[pair][2 * i], f[0], f[2]);
      Widen(bytes[pair][2 * i + 1], f[1], f[3]);
      if constexpr (C::kFormat == WeightFormat::kGroupFp8) {
#pragma unroll
        for (int j = 0; j < 4; ++j) f[j] = Times(f[j], group_scale[pair][j % 2]);
      }
    }
  }
}

// The scales of a thread's part of the weights.
template <typename C>
struct Scales {
  const float* blocks = nullptr;
  const uint2* groups[2] = {};
  float block = 0;
  uint32_t group[4][2] = {};  // pairs of equal bfloat16 numbers, of 32 inputs and of the thread's two outputs

  __device__ Scales(const Arguments& args, const Tile& tile) {
    int warpgroup = threadIdx.x / kWarpgroup, warp = threadIdx.x % kWarpgroup / kWarp, lane = threadIdx.x % kWarp;
    int first = tile.output + (C::kSplits == 1 ? warpgroup * 64 : 0);
    if constexpr (C::kFormat == WeightFormat::kBlockFp8) {
      int64_t columns = (args.inputs + 127) / 128, bands = (args.outputs + args.block_outputs - 1) / args.block_outputs;
      int64_t band = min(first, args.outputs - 1) / args.block_outputs;
      blocks = static_cast<const float*>(args.scales) + (tile.matrix * bands + band) * columns;
    } else if constexpr (C::kFormat == WeightFormat::kGroupFp8) {
      for (int i = 0; i < 2; ++i) {
        int64_t output = min(first + warp * 16 + lane / 4 + 8 * i, args.outputs - 1);
        groups[i] = static_cast<const uint2*>(args.scales) +
                    (static_cast<int64_t>(tile.matrix) * args.outputs + output) * (args.inputs / 128);
      }
    }
  }

  __device__ void Load(int stage) {
    if constexpr (C::kFormat == WeightFormat::kBlockFp8) {
      block = blocks[stage];
    } else if constexpr (C::kFormat == WeightFormat::kGroupFp8) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        uint2 four = groups[i][stage];
#pragma unroll
        for (int j = 0; j < 4; ++j) group[j][i] = __byte_perm(j < 2 ? four.x : four.y, 0, j % 2 ? 0x3232 : 0x1010);
      }
    }
  }
};

}  // namespace mla::few_rows
