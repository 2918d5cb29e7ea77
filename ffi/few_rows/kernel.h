// The kernel of few_rows.h on the device. few_rows.cu launches it.
//
// The tensor cores multiply 64 outputs by as many rows as a group has, 8 to 128: the weights are wgmma's A operand, the
// rows are B, and the product comes out transposed. A persistent grid walks over the tiles of the groups that have
// rows: a tile is kOutputs outputs of one group's matrix times up to kMaxRows of its rows, over all inputs. One thread
// loads stages of 128 bytes of each of a tile's outputs, through a ring that does not drain between tiles. Two TMA
// instructions fill a stage. Each costs that thread 0.1 us: with one for each 8 rows, the weights waited for it. Two
// warpgroups multiply.
//
// FP8 weights go from shared memory to registers, where they become bfloat16: exactly, since e4m3 has fewer bits of
// each kind. The next stage's do while the tensor cores multiply this one's. A block's scale is applied to the float32
// sum of its 128 inputs, in float32. 4-bit values, kept in FP8, are multiplied by their scales as bfloat16 and rounded,
// as dequantizing them does.
//
// The inputs are divided, as tiles may be fewer than multiprocessors: over the CTAs of a cluster, contiguously, and
// inside of a CTA over the two warpgroups, alternately. All parts of a tile are added in one fixed order, through the
// clusters' shared memory. So a result depends on the shapes only, not on other groups' rows.
#pragma once

#include <cuda_bf16.h>

#include <cstdint>
#include <utility>

#include "config.h"
#include "cute/arch/copy_sm90_tma.hpp"
#include "cute/arch/mma_sm90_gmma.hpp"
#include "cutlass/arch/reg_reconfig.h"
#include "fp8_weights.h"
#include "ptx.h"

namespace mla::few_rows {

template <typename C>
struct Kernel {
  struct Storage {
    uint64_t full[C::kStages], empty[C::kStages], sum_full, sum_empty;
    Groups groups;
    alignas(16) float sums[C::kReduceFloats];
  };
  static_assert(sizeof(Storage) + C::kStages * C::kStageBytes + 1024 <= C::kBytes);
  static_assert(C::kBytes <= kSmemBytes);

  const Arguments& args;
  uint8_t* stages;
  Storage& shared;
  int rank = ClusterRank(), size = ClusterSize();
  int first_block = 0, end_block = 0;  // of the inputs, this CTA's

  // The rows of the wgmma instruction that a tile takes.
  __device__ static int Instruction(int rows) {
    int n = C::kMinRows;
    while (n < rows) n *= 2;
    return n;
  }

  // `then(tile)` for this cluster's tiles.
  template <typename Then>
  __device__ void ForTiles(Then then) {
    int output_tiles = (args.outputs + C::kOutputs - 1) / C::kOutputs;
    int tiles = shared.groups.row_tiles * output_tiles;
    for (int i = blockIdx.x / size; i < tiles; i += gridDim.x / size) {
      then(shared.groups.TileAt(i / output_tiles, C::kMaxRows, i % output_tiles * C::kOutputs));
    }
  }

  __device__ void Load(const Maps<C>& maps) {
    constexpr uint64_t kOnce = 0x12f0000000000000, kOften = 0x14f0000000000000, kNormal = 0x1000000000000000;
    Ring<C::kStages> ring;
    int filled = 0;
    ForTiles([&](Tile tile) {
      int n = Instruction(tile.rows), map = 0;
      while (C::kMinRows << map < n) ++map;
      for (int block = first_block; block < end_block; ++block) {
        if (filled >= C::kStages) Wait(&shared.empty[ring.stage], ring.parity ^ 1);
        ++filled;
        uint64_t* full = &shared.full[ring.stage];
        uint8_t* stage = stages + ring.stage * C::kStageBytes;
        ExpectBytes(full, C::kWeightBytes + n * C::kInputs * 2);
        cute::SM90_TMA_LOAD_3D::copy(&maps.weights, full, C::kMaxRows <= 32 ? kOnce : kNormal, stage,
                                     block * C::kInputs, tile.output, tile.matrix);
        cute::SM90_TMA_LOAD_3D::copy(&maps.rows[map], full, kOften, stage + C::kWeightBytes, 0, tile.row,
                                     block * (C::kInputs / 64));
        ring.Next();
      }
    });
  }

  // The product of this warpgroup's part of a tile's inputs. `mine` is the ring's place of its stages.
  template <int kRows>
  __device__ void SumBf16(int block, Ring<C::kStages> mine, float (&sum)[kRows / 2]) {
    int used = -1;
    for (; block < end_block; block += C::kSplits) {
      Wait(&shared.full[mine.stage], mine.parity);
      uint32_t weights = Shared(stages + mine.stage * C::kStageBytes);
      uint64_t a = Descriptor(weights + (C::kSplits == 1 ? threadIdx.x / kWarpgroup * 64 * kSwizzle : 0));
      uint64_t b = Descriptor(weights + C::kWeightBytes);
#pragma unroll
      for (float& x : sum) cute::warpgroup_fence_operand(x);
      cute::warpgroup_arrive();
#pragma unroll
      for (int k = 0; k < 4; ++k) Multiply<kRows>(a + 2 * k, b + 2 * k, sum);
      cute::warpgroup_commit_batch();
      cute::warpgroup_wait<1>();
      if (used >= 0) Release(used);
      used = mine.stage;
      mine.Advance(C::kSplits);
    }
    cute::warpgroup_wait<0>();
#pragma unroll
    for (float& x : sum) cute::warpgroup_fence_operand(x);
    if (used >= 0) Release(used);
  }

  // As SumBf16. While the tensor cores multiply a stage, the next one's weights are widened.
  template <int kRows>
  __device__ void SumFp8(const Tile& tile, int block, Ring<C::kStages> mine, float (&sum)[kRows / 2]) {
    if (block >= end_block) return;
    Scales<C> scales(args, tile);
    float part[kRows / 2], scale;
    Fragments even, odd;
    auto load = [&](Fragments& fragments) {
      scales.Load(block);
      Wait(&shared.full[mine.stage], mine.parity);
      LoadFragments<C>(stages + mine.stage * C::kStageBytes, scales.group, fragments);
    };
    auto multiply = [&](Fragments& now, Fragments& next) {
      int used = mine.stage;
      uint64_t b = Descriptor(Shared(stages + used * C::kStageBytes) + C::kWeightBytes);
#pragma unroll
      for (float& x : part) cute::warpgroup_fence_operand(x);
      cute::warpgroup_arrive();
#pragma unroll
      for (int k = 0; k < 8; ++k) {
        Multiply<kRows>(now[k], b + k / 4 * (kRows * kSwizzle >> 4) + k % 4 * 2, part,
                        k == 0 ? gmma::ScaleOut::Zero : gmma::ScaleOut::One);
      }
      cute::warpgroup_commit_batch();
      scale = C::kFormat == WeightFormat::kBlockFp8 ? scales.block : 1.0f;
      mine.Advance(C::kSplits);
      block += C::kSplits;
      if (block < end_block) load(next);
      cute::warpgroup_wait<0>();
      // The tensor cores read the fragments until here: they had to keep their registers.
#pragma unroll
      for (auto& f : now) {
        for (uint32_t& x : f) cute::warpgroup_fence_operand(x);
      }
#pragma unroll
      for (float& x : part) cute::warpgroup_fence_operand(x);
      Release(used);
#pragma unroll
      for (int i = 0; i < kRows / 2; ++i) sum[i] += scale * part[i];
    };
    load(even);
    while (true) {
      multiply(even, odd);
      if (block >= end_block) break;
      multiply(odd, even);
      if (block >= end_block) break;
    }
  }

  __device__ void Release(int stage) {
    if (threadIdx.x % kWarp == 0) Arrive(&shared.empty[stage]);
  }

  template <int kRows>
  __device__ void MultiplyTile(const Tile& tile, Ring<C::kStages>& ring, int& sums) {
    float sum[kRows / 2] = {};
    Ring<C::kStages> mine = ring;
    int block = first_block;
    if constexpr (C::kSplits == 2) {
      mine.Advance(threadIdx.x / kWarpgroup);
      block += threadIdx.x / kWarpgroup;
    }
    if constexpr (C::kFp8) {
      SumFp8<kRows>(tile, block, mine, sum);
    } else {
      SumBf16<kRows>(block, mine, sum);
    }
    ring.Advance(end_block - first_block);
    AddParts<kRows>(tile, sum, sums);
  }

  // Adds the parts of a tile, and stores it: every rank its share of the outputs, kReduceRows rows at a time.
  template <int kRows>
  __device__ void AddParts(const Tile& tile, const float (&sum)[kRows / 2], int& sums) {
    constexpr int kCount = kRows < kReduceRows ? kRows : kReduceRows;
    constexpr int kStride = ReduceStride(kCount);
    int thread = threadIdx.x, warpgroup = thread / kWarpgroup, lane = thread % kWarp;
    int share = C::kOutputs / size, parts = C::kSplits * size;
    int part = C::kSplits == 2 ? rank * 2 + warpgroup : rank;
    int mine = (C::kSplits == 1 ? warpgroup * 64 : 0) + thread % kWarpgroup / kWarp * 16 + lane / 4;
#pragma unroll
    for (int begin = 0; begin < kRows; begin += kCount) {
      Wait(&shared.sum_empty, (sums & 1) ^ 1);
      if (size > 1 && thread == 0) ExpectBytes(&shared.sum_full, C::kSplits * C::kOutputs * kCount * 4);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        int output = mine + 8 * half;
        float* to = shared.sums + (part * share + output % share) * kStride + lane % 4 * 2;
#pragma unroll
        for (int i = 0; i < kCount / 8; ++i) {  // a fragment has rows 2c and 2c + 1 of each block of 8
          const float* x = &sum[(begin / 8 + i) * 4 + half * 2];
          if (size == 1) {
            *reinterpret_cast<float2*>(to + 8 * i) = make_float2(x[0], x[1]);
          } else {
            SendToRank(to + 8 * i, x[0], x[1], &shared.sum_full, output / share);
          }
        }
      }
      if (size == 1) {
        __syncwarp();
        if (lane == 0) Arrive(&shared.sum_full);
      }
      Wait(&shared.sum_full, sums & 1);
      for (int i = thread; i < kCount * share / 2; i += kConsumers) {
        int row = i / (share / 2), column = i % (share / 2) * 2;
        int output = tile.output + rank * share + column;
        if (begin + row >= tile.rows || output >= args.outputs) continue;
        float2 total = make_float2(0, 0);
        for (int p = 0; p < parts; ++p) {
          const float* x = shared.sums + (p * share + column) * kStride + row;
          total.x += x[0];
          total.y += x[kStride];
        }
        auto* to = args.out + static_cast<int64_t>(tile.row + begin + row) * args.outputs + output;
        *reinterpret_cast<__nv_bfloat162*>(to) = __float22bfloat162_rn(total);
      }
      __syncwarp();
      if (lane < size) ArriveAtRank(&shared.sum_empty, lane);
      ++sums;
    }
  }

  __device__ void MultiplyTiles() {
    Ring<C::kStages> ring;
    int sums = 0;
    ForTiles([&](Tile tile) {
      int n = Instruction(tile.rows);
      if constexpr (C::kMinRows == 8) {
        if (n == 8) return MultiplyTile<8>(tile, ring, sums);
      }
      if constexpr (C::kMinRows == 8 && C::kMaxRows >= 16) {
        if (n == 16) return MultiplyTile<16>(tile, ring, sums);
      }
      if constexpr (C::kMaxRows >= 32) {
        if (n == 32) return MultiplyTile<32>(tile, ring, sums);
      }
      if constexpr (C::kMaxRows >= 64) {
        if (n == 64) return MultiplyTile<64>(tile, ring, sums);
      }
      if constexpr (C::kMaxRows >= 128) {
        if (n == 128) return MultiplyTile<128>(tile, ring, sums);
      }
    });
  }
};

template <typename C>
__global__ void __launch_bounds__(kThreads, 1)
    FewRowsKernel(const __grid_constant__ Maps<C> maps, const Arguments args) {
  extern __shared__ uint8_t memory[];
  uint8_t* aligned = memory + (1024 - Shared(memory) % 1024) % 1024;
  using K = Kernel<C>;
  auto& shared = *reinterpret_cast<typename K::Storage*>(aligned + C::kStages * C::kStageBytes);
  K kernel{args, aligned, shared};
  if (threadIdx.x == kConsumers) {
    cute::prefetch_tma_descriptor(reinterpret_cast<const cute::TmaDescriptor*>(&maps.weights));
    for (auto& map : maps.rows) cute::prefetch_tma_descriptor(reinterpret_cast<const cute::TmaDescriptor*>(&map));
  }
  int blocks = (args.inputs + C::kInputs - 1) / C::kInputs;
  kernel.first_block = kernel.rank * blocks / kernel.size;
  kernel.end_block = (kernel.rank + 1) * blocks / kernel.size;
  if (threadIdx.x == 0) {
    for (int i = 0; i < C::kStages; ++i) {
      Init(&shared.full[i], 1);
      Init(&shared.empty[i], kConsumers / kWarp / C::kSplits);
    }
    // Alone, the warps arrive. In a cluster one thread does, and expects the bytes that all ranks send.
    Init(&shared.sum_full, kernel.size == 1 ? kConsumers / kWarp : 1);
    Init(&shared.sum_empty, kConsumers / kWarp * kernel.size);
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  if (threadIdx.x / kWarp == 1) shared.groups.List(args.group_sizes, args.groups, C::kMaxRows, args.first_matrix);
  __syncthreads();
  if (kernel.size > 1) ClusterSync();
  if (threadIdx.x >= kConsumers) {
    cutlass::arch::warpgroup_reg_dealloc<40>();
    if (threadIdx.x == kConsumers) kernel.Load(maps);
    __syncwarp();
  } else {
    cutlass::arch::warpgroup_reg_alloc<232>();
    kernel.MultiplyTiles();
  }
  if (kernel.size > 1) ClusterSync();  // no CTA may end while another one writes to its memory
}

}  // namespace mla::few_rows
