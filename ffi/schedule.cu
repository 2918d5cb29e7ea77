#include "schedule.h"

#include "shapes.h"

namespace mla {
namespace {

constexpr int kThreads = kMaxScheduledRows;
constexpr int kWarps = kThreads / 32;
constexpr int kCandidatesPerWarp = 4;
constexpr int kCandidates = kWarps * kCandidatesPerWarp;
// The fixed cost of a split, in tiles of keys: it writes its partial output in float32.
constexpr int kSplitOverhead = 1;

__device__ int CeilDiv(int a, int b) { return (a + b - 1) / b; }

// Tiles of keys in the longest part that candidate c allows: from an eighth of an even share to three times it, each
// 2.6 % more than the one before.
__device__ int Longest(int c, int share) {
  return max(1, static_cast<int>(ceilf(share * exp2f(-3.0f + 4.6f * c / (kCandidates - 1)))));
}

__device__ int Splits(int keys, int longest, int most) { return keys == 0 ? 1 : min(most, CeilDiv(keys, longest)); }

__global__ void ScheduleSplitsKernel(const int32_t* cu_q, const int32_t* kv_len, int rows, int heads, int max_splits,
                                     int num_sm, Schedule schedule) {
  __shared__ int query_tiles[kThreads], key_tiles[kThreads], part[kThreads];
  __shared__ unsigned long long total, best;
  int row = threadIdx.x, warp = row / 32, lane = row % 32;
  if (row == 0) total = 0, best = ~0ull;
  __syncthreads();
  int queries = row < rows ? cu_q[row + 1] - cu_q[row] : 0;
  int m = CeilDiv(queries * heads, static_cast<int>(kQueryTile));
  int n = queries > 0 ? CeilDiv(kv_len[row], static_cast<int>(kPageTile)) : 0;
  query_tiles[row] = m;
  key_tiles[row] = n;
  if (m > 0) atomicAdd(&total, static_cast<unsigned long long>(m) * n);
  __syncthreads();

  // The candidate whose last multiprocessor is done first; of equal ones the one with the fewest parts.
  int share = max(1, static_cast<int>((total + num_sm - 1) / num_sm));
  for (int c = warp * kCandidatesPerWarp; c < (warp + 1) * kCandidatesPerWarp; ++c) {
    int parts = 0, tiles = 0;
    for (int i = lane; i < rows; i += 32) {
      int splits = Splits(key_tiles[i], Longest(c, share), max_splits);
      parts += query_tiles[i] * splits;
      tiles = max(tiles, CeilDiv(key_tiles[i], splits));
    }
    parts = __reduce_add_sync(0xffffffff, parts);
    tiles = __reduce_max_sync(0xffffffff, tiles);
    unsigned long long cost = static_cast<unsigned long long>(CeilDiv(parts, num_sm)) * (tiles + kSplitOverhead);
    if (lane == 0) atomicMin(&best, cost * kCandidates + (kCandidates - 1 - c));
  }
  __syncthreads();
  int splits = Splits(n, Longest(kCandidates - 1 - static_cast<int>(best % kCandidates), share), max_splits);
  part[row] = m > 0 ? CeilDiv(n, splits) : -1;
  __syncthreads();
  if (row >= rows) return;

  int place = 0;
  for (int i = 0; i < rows; ++i) place += part[i] > part[row] || (part[i] == part[row] && i < row);
  schedule.splits[place] = splits;
  schedule.query_tiles[place] = m;
  schedule.row_of[place] = row;
  schedule.heads_in_l2[place] = 1;
  if (row == 0) *schedule.tile_counter = 0;
}

}  // namespace

cudaError_t ScheduleSplits(const int32_t* cu_q, const int32_t* kv_len, int64_t rows, int64_t heads, int64_t max_splits,
                           int num_sm, const Schedule& schedule, cudaStream_t stream) {
  ScheduleSplitsKernel<<<1, kThreads, 0, stream>>>(cu_q, kv_len, static_cast<int>(rows), static_cast<int>(heads),
                                                   static_cast<int>(max_splits), num_sm, schedule);
  return cudaGetLastError();
}

}  // namespace mla
