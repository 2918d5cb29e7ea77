#include "split_scheduler.h"

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

// The key tiles of the longest split under candidate c: from 1/8 to 3 times an even share, in steps of 2.6 %.
__device__ int MaxTiles(int c, int share) {
  return max(1, static_cast<int>(ceilf(share * exp2f(-3.0f + 4.6f * c / (kCandidates - 1)))));
}

__device__ int NumSplits(int key_tiles, int max_tiles, int max_splits) {
  return key_tiles == 0 ? 1 : min(max_splits, CeilDiv(key_tiles, max_tiles));
}

__global__ void ScheduleSplitsKernel(const int32_t* cu_q, const int32_t* kv_len, int rows, int heads, int max_splits,
                                     int num_sm, SchedulerMetadata metadata, int32_t* counter) {
  __shared__ int query_tiles[kThreads], key_tiles[kThreads], split_tiles[kThreads];
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

  // The candidate whose last multiprocessor finishes first; among equals, the one with the fewest splits.
  int share = max(1, static_cast<int>((total + num_sm - 1) / num_sm));
  for (int c = warp * kCandidatesPerWarp; c < (warp + 1) * kCandidatesPerWarp; ++c) {
    int total_splits = 0, max_tiles = 0;
    for (int i = lane; i < rows; i += 32) {
      int splits = NumSplits(key_tiles[i], MaxTiles(c, share), max_splits);
      total_splits += query_tiles[i] * splits;
      max_tiles = max(max_tiles, CeilDiv(key_tiles[i], splits));
    }
    total_splits = __reduce_add_sync(0xffffffff, total_splits);
    max_tiles = __reduce_max_sync(0xffffffff, max_tiles);
    unsigned long long cost =
        static_cast<unsigned long long>(CeilDiv(total_splits, num_sm)) * (max_tiles + kSplitOverhead);
    if (lane == 0) atomicMin(&best, cost * kCandidates + (kCandidates - 1 - c));
  }
  __syncthreads();
  int splits = NumSplits(n, MaxTiles(kCandidates - 1 - static_cast<int>(best % kCandidates), share), max_splits);
  split_tiles[row] = m > 0 ? CeilDiv(n, splits) : -1;
  __syncthreads();
  if (row >= rows) return;

  // The position in order of length.
  int place = 0;
  for (int i = 0; i < rows; ++i)
    place += split_tiles[i] > split_tiles[row] || (split_tiles[i] == split_tiles[row] && i < row);
  metadata.num_splits_dynamic[place] = splits;
  metadata.num_m_blocks[place] = m;
  metadata.varlen_batch_idx[place] = row;
  metadata.num_nheads_in_l2[place] = 1;
  if (row == 0 && counter) *counter = 0;
}

__global__ void ClearCounterKernel(int32_t* counter) { *counter = 0; }

}  // namespace

cudaError_t ScheduleSplits(const int32_t* cu_q, const int32_t* kv_len, int64_t rows, int64_t heads, int64_t max_splits,
                           int num_sm, const SchedulerMetadata& metadata, int32_t* counter, cudaStream_t stream) {
  ScheduleSplitsKernel<<<1, kThreads, 0, stream>>>(cu_q, kv_len, static_cast<int>(rows), static_cast<int>(heads),
                                                   static_cast<int>(max_splits), num_sm, metadata, counter);
  return cudaGetLastError();
}

cudaError_t ClearCounter(int32_t* counter, cudaStream_t stream) {
  ClearCounterKernel<<<1, 1, 0, stream>>>(counter);
  return cudaGetLastError();
}

}  // namespace mla
