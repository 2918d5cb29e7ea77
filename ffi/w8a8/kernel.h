// The kernel of w8a8.h on the device. w8a8.cu launches it.
//
// A persistent grid walks over tiles of 128 rows of one group times 128 outputs of its matrix. A stage holds 128 inputs
// of both, and their scales. One thread loads the operands with TMA, one warp copies the scales, through a ring that
// does not drain between tiles. Scales go through the ring too, because a plain load of one, even a stage ahead, took
// as long as a stage: the kernel reached 780 TFLOP/s where it now reaches 1220. TMA can't load them: it wants addresses
// that are multiples of 16 bytes, and groups begin anywhere. Two warpgroups multiply 64 rows each.
//
// The tensor cores add in less than float32's precision (DeepSeek-V3, arXiv:2412.19437, section 3.3.2), and a scale is
// of 128 inputs: so each stage's product is an accumulator of its own, added to the tile's float32 sum with its scales.
// A warpgroup issues two stages at a time, and adds the first one's while the tensor cores multiply the second one's.
//
// Two CTAs of a cluster have neighboring outputs of the same rows: each loads half of the rows, for both. All inputs of
// an output are added in order by one warpgroup, so that a row's result does not depend on other rows.
#pragma once

#include <cuda.h>
#include <cuda_bf16.h>

#include <cstdint>
#include <utility>

#include "../grouped/groups.h"
#include "../grouped/ptx.h"
#include "../w8a8.h"
#include "cute/arch/copy_sm90_tma.hpp"
#include "cute/arch/mma_sm90_gmma.hpp"
#include "cutlass/arch/reg_reconfig.h"

namespace mla::w8a8 {

namespace gmma = cute::SM90::GMMA;

constexpr int kTile = 128;  // rows, outputs, and inputs of a stage
static_assert(kTile == kScaleBlock && kTile == kSwizzle);
constexpr int kCluster = 2;
constexpr int kConsumers = 2 * kWarpgroup;
constexpr int kThreads = kConsumers + kWarpgroup;
constexpr int kOperandBytes = kTile * kTile;
constexpr int kStageBytes = 2 * kOperandBytes;
constexpr int kStages = 5;
constexpr int kSums = 64;              // floats of a thread: 64 rows times 128 outputs over a warpgroup
constexpr int kStagedRow = kTile + 8;  // bfloat16 numbers, such that a warp's writes are in different banks

struct Maps {
  CUtensorMap rows, weights;
};

struct Arguments {
  const float* row_scales;
  const float* weight_scales;
  const int32_t* group_sizes;
  const int32_t* first_matrix;
  __nv_bfloat16* out;
  int rows, inputs, outputs, groups;
};

struct Storage {
  uint64_t full[kStages], empty[kStages];
  float row_scales[kStages][kTile], weight_scale[kStages];
  Groups groups;
  alignas(16) __nv_bfloat16 staged[kConsumers / kWarp][16][kStagedRow];
};

constexpr int kBytes = kStages * kStageBytes + static_cast<int>(sizeof(Storage)) + 1024;  // and alignment
static_assert(kBytes <= kSmemBytes);

// Copies a float to shared memory, asynchronously.
__device__ inline void CopyAsync(float* to, const float* from) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(Shared(to)), "l"(from) : "memory");
}

// Arrives at a barrier once this thread's copies are done.
__device__ inline void ArriveWithCopies(uint64_t* barrier) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared.b64 [%0];" ::"r"(Shared(barrier)) : "memory");
}

template <size_t... i>
__device__ void Multiply(uint64_t a, uint64_t b, float* d, gmma::ScaleOut scale, std::index_sequence<i...>) {
  gmma::MMA_64x128x32_F32E4M3E4M3_SS_TN<>::fma(a, b, d[i]..., scale);
}

struct Kernel {
  const Arguments& args;
  uint8_t* stages;
  Storage& shared;
  int rank = ClusterRank();
  // Of consumers. From one lane, so that the compiler knows it equal in a warp: descriptors are made in uniform
  // registers.
  int warpgroup = __shfl_sync(~0u, static_cast<int>(threadIdx.x) / kWarpgroup, 0);
  int blocks = (args.inputs + kTile - 1) / kTile;
  int output_blocks = (args.outputs + kTile - 1) / kTile;

  // `then(tile)` for this CTA's tiles. The last output of a cluster may have none: TMA fills it with zeros.
  template <typename Then>
  __device__ void ForTiles(Then then) {
    int pairs = (output_blocks + kCluster - 1) / kCluster, tiles = shared.groups.row_tiles * pairs;
    for (int i = blockIdx.x / kCluster; i < tiles; i += gridDim.x / kCluster) {
      then(shared.groups.TileAt(i / pairs, kTile, (i % pairs * kCluster + rank) * kTile));
    }
  }

  // `fill(stage, block)` for each block of inputs of each tile, when its stage is empty.
  template <typename Fill>
  __device__ void FillStages(Ring<kStages>& ring, int& filled, Fill fill) {
    for (int block = 0; block < blocks; ++block) {
      if (filled >= kStages) Wait(&shared.empty[ring.stage], ring.parity ^ 1);
      ++filled;
      fill(ring.stage, block);
      ring.Next();
    }
  }

  __device__ void LoadOperands(const Maps& maps) {
    constexpr uint64_t kNormal = 0x1000000000000000;
    constexpr int kRows = kTile / kCluster;
    Ring<kStages> ring;
    int filled = 0;
    ForTiles([&](Tile tile) {
      FillStages(ring, filled, [&](int stage, int block) {
        uint64_t* full = &shared.full[stage];
        uint8_t* to = stages + stage * kStageBytes;
        ExpectBytes(full, kStageBytes);
        cute::SM90_TMA_LOAD_MULTICAST_3D::copy(&maps.rows, full, (1 << kCluster) - 1, kNormal,
                                               to + rank * kRows * kTile, block * kTile, tile.row + rank * kRows, 0);
        cute::SM90_TMA_LOAD_3D::copy(&maps.weights, full, kNormal, to + kOperandBytes, block * kTile, tile.output,
                                     tile.matrix);
      });
    });
  }

  // One warp.
  __device__ void LoadScales() {
    int lane = threadIdx.x % kWarp;
    Ring<kStages> ring;
    int filled = 0;
    ForTiles([&](Tile tile) {
      int output_block = min(tile.output / kTile, output_blocks - 1);
      const float* weight_scale =
          args.weight_scales + (static_cast<int64_t>(tile.matrix) * output_blocks + output_block) * blocks;
      const float* row_scales = args.row_scales;
      FillStages(ring, filled, [&](int stage, int block) {
        for (int i = lane; i < kTile; i += kWarp) {
          CopyAsync(&shared.row_scales[stage][i], row_scales + min(tile.row + i, args.rows - 1));
        }
        row_scales += args.rows;
        if (lane == 0) CopyAsync(&shared.weight_scale[stage], weight_scale + block);
        ArriveWithCopies(&shared.full[stage]);
      });
    });
    asm volatile("cp.async.wait_all;" ::: "memory");
  }

  // A stage's product, and its scales for the thread's two rows.
  struct Part {
    float sum[kSums], scale[2];
    int stage;
  };

  __device__ void Issue(Part& part, Ring<kStages>& ring) {
    Wait(&shared.full[ring.stage], ring.parity);
    int row = threadIdx.x / kWarp * 16 + threadIdx.x % kWarp / 4;
    uint32_t stage = Shared(stages + ring.stage * kStageBytes);
    uint64_t a = Descriptor(stage + warpgroup * 64 * kTile), b = Descriptor(stage + kOperandBytes);
#pragma unroll
    for (float& x : part.sum) cute::warpgroup_fence_operand(x);
    cute::warpgroup_arrive();
#pragma unroll
    for (int i = 0; i < kTile / 32; ++i) {  // 32 inputs are 2 of a descriptor's units of 16 bytes
      Multiply(a + 2 * i, b + 2 * i, part.sum, i == 0 ? gmma::ScaleOut::Zero : gmma::ScaleOut::One,
               std::make_index_sequence<kSums>());
    }
    cute::warpgroup_commit_batch();
    for (int i = 0; i < 2; ++i) {
      part.scale[i] = shared.row_scales[ring.stage][row + 8 * i] * shared.weight_scale[ring.stage];
    }
    part.stage = ring.stage;
    ring.Next();
  }

  __device__ void Add(Part& part, float (&sum)[kSums]) {
#pragma unroll
    for (float& x : part.sum) cute::warpgroup_fence_operand(x);
    Release(part.stage);
#pragma unroll
    for (int i = 0; i < kSums; ++i) sum[i] += part.scale[i / 2 % 2] * part.sum[i];
  }

  // Tells both CTAs, which load into this one's memory, that this warp has read a stage.
  __device__ void Release(int stage) {
    int lane = threadIdx.x % kWarp;
    if (lane < kCluster) ArriveAtRank(&shared.empty[stage], lane);
  }

  __device__ void MultiplyTiles() {
    Ring<kStages> ring;
    ForTiles([&](Tile tile) {
      if (warpgroup * 64 >= tile.rows) {  // a group's last tile may have rows for one warpgroup only
        for (int block = 0; block < blocks; ++block, ring.Next()) {
          Wait(&shared.full[ring.stage], ring.parity);
          Release(ring.stage);
        }
        return;
      }
      float sum[kSums] = {};
      Part even, odd;
      int block = 0;
      for (; block + 2 <= blocks; block += 2) {
        Issue(even, ring);
        Issue(odd, ring);
        cute::warpgroup_wait<1>();
        Add(even, sum);
        cute::warpgroup_wait<0>();
        Add(odd, sum);
      }
      if (block < blocks) {
        Issue(even, ring);
        cute::warpgroup_wait<0>();
        Add(even, sum);
      }
      Store(tile, sum);
    });
  }

  // Stores a warp's 16 rows, through shared memory: 16 bytes a thread, neighboring threads side by side.
  __device__ void Store(const Tile& tile, const float (&sum)[kSums]) {
    int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
    auto& staged = shared.staged[warp];
#pragma unroll
    for (int i = 0; i < kSums; i += 2) {  // "register fragments for wgmma.mma_async.m64nNk32" in the PTX ISA
      int row = lane / 4 + i / 2 % 2 * 8, column = i / 4 * 8 + lane % 4 * 2;
      *reinterpret_cast<__nv_bfloat162*>(&staged[row][column]) = __floats2bfloat162_rn(sum[i], sum[i + 1]);
    }
    __syncwarp();
    int column = lane % 16 * 8;
#pragma unroll
    for (int i = 0; i < 16; i += 2) {
      int row = i + lane / 16, in_tile = warp * 16 + row;
      if (in_tile < tile.rows && tile.output + column < args.outputs) {
        auto* to = args.out + static_cast<int64_t>(tile.row + in_tile) * args.outputs + tile.output + column;
        *reinterpret_cast<uint4*>(to) = *reinterpret_cast<const uint4*>(&staged[row][column]);
      }
    }
    __syncwarp();
  }
};

__global__ void __launch_bounds__(kThreads, 1)
    W8A8Kernel(const __grid_constant__ Maps maps, const __grid_constant__ Arguments args) {
  extern __shared__ uint8_t memory[];
  uint8_t* aligned = memory + (1024 - Shared(memory) % 1024) % 1024;
  auto& shared = *reinterpret_cast<Storage*>(aligned + kStages * kStageBytes);
  Kernel kernel{args, aligned, shared};
  if (threadIdx.x == kConsumers) {
    cute::prefetch_tma_descriptor(reinterpret_cast<const cute::TmaDescriptor*>(&maps.rows));
    cute::prefetch_tma_descriptor(reinterpret_cast<const cute::TmaDescriptor*>(&maps.weights));
  }
  if (threadIdx.x == 0) {
    for (int i = 0; i < kStages; ++i) {
      Init(&shared.full[i], 1 + kWarp);  // the thread that loads operands, the warp that loads scales
      Init(&shared.empty[i], kConsumers / kWarp * kCluster);
    }
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  if (threadIdx.x / kWarp == 1) shared.groups.List(args.group_sizes, args.groups, kTile, args.first_matrix);
  __syncthreads();
  ClusterSync();
  if (threadIdx.x >= kConsumers) {
    cutlass::arch::warpgroup_reg_dealloc<56>();
    if (threadIdx.x == kConsumers) kernel.LoadOperands(maps);
    if (threadIdx.x / kWarp == kConsumers / kWarp + 1) kernel.LoadScales();
    __syncwarp();
  } else {
    cutlass::arch::warpgroup_reg_alloc<224>();
    kernel.MultiplyTiles();
  }
  ClusterSync();  // no CTA may end while another one writes to its memory
}

}  // namespace mla::w8a8
