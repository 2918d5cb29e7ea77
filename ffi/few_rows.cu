// The kernel of few_rows.h.
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

#include "few_rows.h"

#include <cuda.h>
#include <cuda_bf16.h>

#include <algorithm>
#include <utility>

#include "cute/arch/copy_sm90_tma.hpp"
#include "cute/arch/mma_sm90_gmma.hpp"
#include "cutlass/arch/reg_reconfig.h"

namespace mla {
namespace {

namespace gmma = cute::SM90::GMMA;

constexpr int kWarp = 32;
constexpr int kWarpgroup = 128;
constexpr int kConsumers = 2 * kWarpgroup;
constexpr int kThreads = kConsumers + kWarpgroup;  // registers are dealt to warpgroups: one loads, with one thread
constexpr int kSmemBytes = 227 << 10;              // that a CTA may have
constexpr int kSwizzle = 128;                      // bytes of a row in shared memory, swizzled in atoms of 8 rows
constexpr int kMaxCluster = 8;
constexpr int kMinBlocks = 7;    // stages of a CTA of a cluster: with 6 the cluster cost what it gained (V3's q_b)
constexpr int kReduceRows = 32;  // rows of a tile whose parts are added at a time

// Floats between the outputs of `kRows` rows, such that a warp's writes are in different banks.
constexpr int ReduceStride(int rows) { return rows > 8 ? rows + 8 : rows; }

template <WeightFormat kFormat_, int kMaxRows_>
struct Config {
  static constexpr WeightFormat kFormat = kFormat_;
  static constexpr int kMaxRows = kMaxRows_;
  // With few rows the warpgroups share the outputs and take every other stage; with many they share the stages, so that
  // a stage of rows serves twice as many outputs.
  static constexpr int kSplits = kMaxRows <= 64 ? 2 : 1;
  static constexpr int kOutputs = kSplits == 2 ? 64 : 128;
  static constexpr bool kFp8 = kFormat != WeightFormat::kBf16;
  static constexpr int kInputs = kFp8 ? 128 : 64;           // of a stage
  static constexpr int kMinRows = kMaxRows <= 32 ? 8 : 32;  // of a wgmma instruction: this, doubled, up to kMaxRows
  static constexpr int kMaps = kMaxRows == 32 || kMaxRows == 128 ? 3 : kMaxRows == 64 ? 2 : 1;  // one for each
  static constexpr int kWeightBytes = kOutputs * kSwizzle;
  static constexpr int kStageBytes = kWeightBytes + kMaxRows * kInputs * 2;
  static constexpr int kReduce = kMaxRows < kReduceRows ? kMaxRows : kReduceRows;
  static constexpr int kReduceFloats = kSplits * kOutputs * ReduceStride(kReduce);
  static constexpr int kOtherBytes = kReduceFloats * 4 + 2 * kMaxGroups * 4 + 1536;  // and barriers, alignment
  static constexpr int kStages = std::min((kSmemBytes - kOtherBytes) / kStageBytes, 24);
  static constexpr int kBytes = kStages * kStageBytes + kOtherBytes;
};

template <typename C>
struct Maps {
  CUtensorMap weights, rows[C::kMaps];  // rows: in 64 inputs, rows, and blocks of 64 inputs
};

struct Arguments {
  const void* scales;
  const int32_t* group_sizes;
  const int32_t* first_matrix;
  __nv_bfloat16* out;
  int groups, inputs, outputs, block_outputs;
};

__device__ uint32_t Shared(const void* p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }

__device__ uint32_t OfRank(uint32_t address, int rank) {
  uint32_t there;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(address), "r"(rank));
  return there;
}

__device__ void Init(uint64_t* barrier, int count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(Shared(barrier)), "r"(count));
}

__device__ void Arrive(uint64_t* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(Shared(barrier)) : "memory");
}

__device__ void ArriveAtRank(uint64_t* barrier, int rank) {
  asm volatile("mbarrier.arrive.shared::cluster.b64 _, [%0];" ::"r"(OfRank(Shared(barrier), rank)) : "memory");
}

// Writes two floats to the shared memory of a rank, and counts their bytes at its barrier.
__device__ void SendToRank(float* to, float x, float y, uint64_t* barrier, int rank) {
  asm volatile("st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v2.f32 [%0], {%1, %2}, [%3];" ::"r"(
                   OfRank(Shared(to), rank)),
               "f"(x), "f"(y), "r"(OfRank(Shared(barrier), rank))
               : "memory");
}

__device__ void ExpectBytes(uint64_t* barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(Shared(barrier)), "r"(bytes) : "memory");
}

__device__ void Wait(uint64_t* barrier, int parity) {
  asm volatile(
      "{\n.reg .pred done;\n"
      "again: mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra again;\n}" ::"r"(Shared(barrier)),
      "r"(parity)
      : "memory");
}

__device__ int ClusterRank() {
  int rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}

__device__ int ClusterSize() {
  int size;
  asm volatile("mov.u32 %0, %%cluster_nctarank;" : "=r"(size));
  return size;
}

// Waits until all threads of the cluster have started (or ended).
__device__ void ClusterSync() {
  asm volatile("barrier.cluster.arrive.aligned;\nbarrier.cluster.wait.aligned;" ::: "memory");
}

// A place in the ring of stages, and the parity of its barriers' phase.
template <int kStages>
struct Ring {
  int stage = 0, parity = 0;
  __device__ void Advance(int n) {
    stage += n;
    while (stage >= kStages) {
      stage -= kStages;
      parity ^= 1;
    }
  }
};

// Descriptor of an operand in shared memory: K-major rows of 128 bytes, swizzled, atoms of 8 rows one behind the other.
__device__ uint64_t Descriptor(uint32_t address) {
  constexpr uint64_t kAtomStride = uint64_t{8 * kSwizzle >> 4} << 32, kSwizzle128 = uint64_t{1} << 62;
  return ((address & 0x3ffff) >> 4) | uint64_t{1} << 16 | kAtomStride | kSwizzle128;
}

template <int kRows>
struct Wgmma;
#define MLA_WGMMA(N)                                                                 \
  template <>                                                                        \
  struct Wgmma<N> {                                                                  \
    using SS = gmma::MMA_64x##N##x16_F32BF16BF16_SS<gmma::Major::K, gmma::Major::K>; \
    using RS = gmma::MMA_64x##N##x16_F32BF16BF16_RS<gmma::Major::K, gmma::Major::K>; \
  }
MLA_WGMMA(8);
MLA_WGMMA(16);
MLA_WGMMA(32);
MLA_WGMMA(64);
MLA_WGMMA(128);
#undef MLA_WGMMA

template <int kRows, size_t... i>
__device__ void Multiply(const uint32_t (&a)[4], uint64_t b, float* d, gmma::ScaleOut scale,
                         std::index_sequence<i...>) {
  Wgmma<kRows>::RS::fma(a[0], a[1], a[2], a[3], b, d[i]..., scale);
}

template <int kRows, size_t... i>
__device__ void Multiply(uint64_t a, uint64_t b, float* d, std::index_sequence<i...>) {
  Wgmma<kRows>::SS::fma(a, b, d[i]..., gmma::ScaleOut::One);
}

__device__ uint32_t Times(uint32_t pair, uint32_t factor) {
  uint32_t product;
  asm("mul.rn.bf16x2 %0, %1, %2;" : "=r"(product) : "r"(pair), "r"(factor));
  return product;
}

// Bytes of e4m3 to bfloat16: `low` gets bytes 0 and 2, `high` 1 and 3. Sign, exponent and mantissa are put where
// bfloat16 has them; a product with 2^(127 - 7) corrects the exponent, of subnormal numbers too. No NaN: the loader
// refuses them.
__device__ void Widen(uint32_t bytes, uint32_t& low, uint32_t& high) {
  constexpr uint32_t kSign = 0x80008000, kRest = 0x07f007f0, kBias = 0x7b807b80;
  low = Times((bytes << 8 & kSign) | (bytes << 4 & kRest), kBias);
  high = Times((bytes & kSign) | (bytes >> 4 & kRest), kBias);
}

__device__ void LoadMatrices(uint32_t address, uint32_t (&r)[4]) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address));
}

template <typename C>
struct Kernel {
  struct Storage {
    uint64_t full[C::kStages], empty[C::kStages], sum_full, sum_empty;
    int first_matrix, row_begin[kMaxGroups + 1], tile_end[kMaxGroups];
    alignas(16) float sums[C::kReduceFloats];
  };
  static_assert(sizeof(Storage) + C::kStages * C::kStageBytes + 1024 <= C::kBytes);
  static_assert(C::kBytes <= kSmemBytes);

  struct Tile {
    int matrix, row, rows, output;
  };

  const Arguments& args;
  uint8_t* stages;
  Storage& shared;
  int rank = ClusterRank(), size = ClusterSize();
  int first_block = 0, end_block = 0;  // of the inputs, this CTA's

  // Lists the groups' rows and tiles of rows, in shared memory. One warp.
  __device__ void ListGroups() {
    int lane = threadIdx.x % kWarp, rows = 0, tiles = 0;
    for (int begin = 0; begin < args.groups; begin += kWarp) {
      int group = begin + lane, count = group < args.groups ? args.group_sizes[group] : 0;
      int row_sum = count, tile_sum = (count + C::kMaxRows - 1) / C::kMaxRows;
      for (int i = 1; i < kWarp; i *= 2) {
        int other_rows = __shfl_up_sync(~0u, row_sum, i), other_tiles = __shfl_up_sync(~0u, tile_sum, i);
        if (lane >= i) {
          row_sum += other_rows;
          tile_sum += other_tiles;
        }
      }
      if (group < args.groups) {
        shared.row_begin[group] = rows + row_sum - count;
        shared.tile_end[group] = tiles + tile_sum;
      }
      rows += __shfl_sync(~0u, row_sum, kWarp - 1);
      tiles += __shfl_sync(~0u, tile_sum, kWarp - 1);
    }
    if (lane == 0) {
      shared.row_begin[args.groups] = rows;
      shared.first_matrix = *args.first_matrix;
    }
  }

  __device__ Tile TileAt(int index, int output_tiles) const {
    int row_tile = index / output_tiles, low = 0, high = args.groups - 1;
    while (low < high) {  // the first group that ends after row_tile
      int middle = (low + high) / 2;
      if (shared.tile_end[middle] > row_tile) {
        high = middle;
      } else {
        low = middle + 1;
      }
    }
    int before = low == 0 ? 0 : shared.tile_end[low - 1];
    int row = shared.row_begin[low] + (row_tile - before) * C::kMaxRows;
    return {shared.first_matrix + low, row, min(C::kMaxRows, shared.row_begin[low + 1] - row),
            index % output_tiles * C::kOutputs};
  }

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
    int tiles = shared.tile_end[args.groups - 1] * output_tiles;
    for (int i = blockIdx.x / size; i < tiles; i += gridDim.x / size) then(TileAt(i, output_tiles));
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
        ring.Advance(1);
      }
    });
  }

  // A warp's part of a stage's FP8 weights, as bfloat16 fragments of eight wgmma instructions.
  using Fragments = uint32_t[8][4];

  __device__ void LoadFragments(const uint8_t* stage, const uint32_t (&group_scale)[4][2], Fragments& fragments) const {
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
  struct Scales {
    const float* blocks = nullptr;
    const uint2* groups[2] = {};
    float block = 0;
    uint32_t group[4][2] = {};  // pairs of equal bfloat16 numbers, of 32 inputs and of the thread's two outputs

    __device__ Scales(const Arguments& args, const Tile& tile) {
      int warpgroup = threadIdx.x / kWarpgroup, warp = threadIdx.x % kWarpgroup / kWarp, lane = threadIdx.x % kWarp;
      int first = tile.output + (C::kSplits == 1 ? warpgroup * 64 : 0);
      if constexpr (C::kFormat == WeightFormat::kBlockFp8) {
        int64_t columns = (args.inputs + 127) / 128,
                bands = (args.outputs + args.block_outputs - 1) / args.block_outputs;
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

  template <int kRows>
  __device__ void MultiplyTile(const Tile& tile, Ring<C::kStages>& ring, int& sums) {
    constexpr auto kSum = std::make_index_sequence<kRows / 2>();
    int warpgroup = threadIdx.x / kWarpgroup, lane = threadIdx.x % kWarp;
    float sum[kRows / 2] = {};
    Ring<C::kStages> mine = ring;
    int block = first_block;
    if constexpr (C::kSplits == 2) {
      mine.Advance(warpgroup);
      block += warpgroup;
    }
    auto stage = [&] { return stages + mine.stage * C::kStageBytes; };
    auto release = [&](int used) {
      if (lane == 0) Arrive(&shared.empty[used]);
    };
    if constexpr (!C::kFp8) {
      int used = -1;
      for (; block < end_block; block += C::kSplits) {
        Wait(&shared.full[mine.stage], mine.parity);
        uint64_t a = Descriptor(Shared(stage()) + (C::kSplits == 1 ? warpgroup * 64 * kSwizzle : 0));
        uint64_t b = Descriptor(Shared(stage()) + C::kWeightBytes);
#pragma unroll
        for (float& x : sum) cute::warpgroup_fence_operand(x);
        cute::warpgroup_arrive();
#pragma unroll
        for (int k = 0; k < 4; ++k) Multiply<kRows>(a + 2 * k, b + 2 * k, sum, kSum);
        cute::warpgroup_commit_batch();
        cute::warpgroup_wait<1>();
        if (used >= 0) release(used);
        used = mine.stage;
        mine.Advance(C::kSplits);
      }
      cute::warpgroup_wait<0>();
#pragma unroll
      for (float& x : sum) cute::warpgroup_fence_operand(x);
      if (used >= 0) release(used);
    } else if (block < end_block) {
      Scales scales(args, tile);
      float part[kRows / 2], scale;
      Fragments even, odd;
      // While the tensor cores multiply a stage, the next one's weights are widened.
      auto multiply = [&](Fragments& now, Fragments& next) {
        int used = mine.stage;
        uint64_t b = Descriptor(Shared(stage()) + C::kWeightBytes);
#pragma unroll
        for (float& x : part) cute::warpgroup_fence_operand(x);
        cute::warpgroup_arrive();
#pragma unroll
        for (int k = 0; k < 8; ++k) {
          Multiply<kRows>(now[k], b + k / 4 * (kRows * kSwizzle >> 4) + k % 4 * 2, part,
                          k == 0 ? gmma::ScaleOut::Zero : gmma::ScaleOut::One, kSum);
        }
        cute::warpgroup_commit_batch();
        scale = C::kFormat == WeightFormat::kBlockFp8 ? scales.block : 1.0f;
        mine.Advance(C::kSplits);
        block += C::kSplits;
        if (block < end_block) {
          scales.Load(block);
          Wait(&shared.full[mine.stage], mine.parity);
          LoadFragments(stage(), scales.group, next);
        }
        cute::warpgroup_wait<0>();
        // The tensor cores read the fragments until here: they had to keep their registers.
#pragma unroll
        for (auto& f : now) {
          for (uint32_t& x : f) cute::warpgroup_fence_operand(x);
        }
#pragma unroll
        for (float& x : part) cute::warpgroup_fence_operand(x);
        release(used);
#pragma unroll
        for (int i = 0; i < kRows / 2; ++i) sum[i] += scale * part[i];
      };
      scales.Load(block);
      Wait(&shared.full[mine.stage], mine.parity);
      LoadFragments(stage(), scales.group, even);
      while (true) {
        multiply(even, odd);
        if (block >= end_block) break;
        multiply(odd, even);
        if (block >= end_block) break;
      }
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
  if (threadIdx.x / kWarp == 1) kernel.ListGroups();
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

using Encode = CUresult (*)(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*, const cuuint64_t*, const cuuint64_t*,
                            const cuuint32_t*, const cuuint32_t*, CUtensorMapInterleave, CUtensorMapSwizzle,
                            CUtensorMapL2promotion, CUtensorMapFloatOOBfill);

cudaError_t FindEncode(Encode& encode) {
  static Encode found = nullptr;
  static cudaError_t status = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult result{};
#if CUDART_VERSION >= 12050
    cudaError_t error =
        cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &result);
#else
    cudaError_t error = cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &function, cudaEnableDefault, &result);
#endif
    found = reinterpret_cast<Encode>(function);
    return error != cudaSuccess ? error : result == cudaDriverEntryPointSuccess ? cudaSuccess : cudaErrorNotSupported;
  }();
  encode = found;
  return status;
}

template <typename C>
cudaError_t Launch(const FewRows& call, int num_sm, cudaStream_t stream) {
  Encode encode;
  if (cudaError_t status = FindEncode(encode); status != cudaSuccess) return status;
  Maps<C> maps;
  constexpr cuuint64_t kBytes = C::kFp8 ? 1 : 2;
  auto inputs = static_cast<cuuint64_t>(call.inputs), outputs = static_cast<cuuint64_t>(call.outputs);
  auto make = [&](CUtensorMap* map, CUtensorMapDataType type, const void* data, const cuuint64_t(&sizes)[3],
                  const cuuint64_t(&strides)[2], const cuuint32_t(&box)[3]) {
    constexpr cuuint32_t kOnes[3] = {1, 1, 1};
    return encode(map, type, 3, const_cast<void*>(data), sizes, strides, box, kOnes, CU_TENSOR_MAP_INTERLEAVE_NONE,
                  CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  };
  CUresult result = make(&maps.weights, C::kFp8 ? CU_TENSOR_MAP_DATA_TYPE_UINT8 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
                         call.weights, {inputs, outputs, static_cast<cuuint64_t>(call.matrices)},
                         {inputs * kBytes, inputs * outputs * kBytes}, {C::kInputs, C::kOutputs, 1});
  for (int i = 0; i < C::kMaps && result == CUDA_SUCCESS; ++i) {
    result = make(&maps.rows[i], CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, call.x,
                  {64, static_cast<cuuint64_t>(call.rows), inputs / 64}, {inputs * 2, 128},
                  {64, static_cast<cuuint32_t>(C::kMinRows << i), C::kInputs / 64});
  }
  if (result != CUDA_SUCCESS) return cudaErrorInvalidValue;

  int64_t output_tiles = (call.outputs + C::kOutputs - 1) / C::kOutputs;
  int64_t blocks = (call.inputs + C::kInputs - 1) / C::kInputs;
  // An upper bound: which groups have rows is known on the device only.
  int64_t used_groups = std::min(call.rows, call.groups);
  int64_t row_tiles = used_groups + (call.rows - used_groups) / C::kMaxRows;
  // Only where one group's tiles can't fill the GPU. Several groups' can, mostly, and were slower when divided.
  int cluster = 1;
  while (call.groups == 1 && cluster < kMaxCluster && row_tiles * output_tiles * cluster * 2 <= num_sm &&
         blocks >= 2 * kMinBlocks * cluster) {
    cluster *= 2;
  }
  int64_t clusters = std::min<int64_t>(num_sm / cluster, row_tiles * output_tiles);
  auto* kernel = FewRowsKernel<C>;
  cudaError_t status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, C::kBytes);
  if (status != cudaSuccess) return status;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(clusters * cluster));
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = C::kBytes;
  config.stream = stream;
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim.x = static_cast<unsigned>(cluster);
  attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
  config.attrs = &attribute;
  config.numAttrs = 1;
  Arguments args{call.scales,
                 call.group_sizes,
                 call.first_matrix,
                 static_cast<__nv_bfloat16*>(call.out),
                 static_cast<int>(call.groups),
                 static_cast<int>(call.inputs),
                 static_cast<int>(call.outputs),
                 static_cast<int>(call.block_outputs)};
  return cudaLaunchKernelEx(&config, kernel, maps, args);
}

template <WeightFormat kFormat>
cudaError_t LaunchFormat(const FewRows& call, int num_sm, cudaStream_t stream) {
  if (call.max_rows <= 8) return Launch<Config<kFormat, 8>>(call, num_sm, stream);
  if (call.max_rows <= 32) return Launch<Config<kFormat, 32>>(call, num_sm, stream);
  if (call.max_rows <= 64) return Launch<Config<kFormat, 64>>(call, num_sm, stream);
  return Launch<Config<kFormat, 128>>(call, num_sm, stream);
}

}  // namespace

cudaError_t MultiplyFewRows(const FewRows& call, int num_sm, cudaStream_t stream) {
  switch (call.format) {
    case WeightFormat::kBf16:
      return LaunchFormat<WeightFormat::kBf16>(call, num_sm, stream);
    case WeightFormat::kBlockFp8:
      return LaunchFormat<WeightFormat::kBlockFp8>(call, num_sm, stream);
    default:
      return LaunchFormat<WeightFormat::kGroupFp8>(call, num_sm, stream);
  }
}

}  // namespace mla
