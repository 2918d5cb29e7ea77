// The kernel of sort_pairs.h: one block. A warp counts the experts of its part of the pairs, in their order; a pair's
// row is its expert's first one, plus the pairs of that expert in the parts before and in its own part before it.

#include "sort_pairs.h"

#include "../warp.h"

namespace mla {
namespace {

constexpr int kWarps = 32;
constexpr int kThreads = kWarps * kWarp;
constexpr int kMaxRounds = kMaxPairs / kThreads;
static_assert(kMaxGroups <= kThreads, "a thread has an expert");

__device__ int InclusiveSum(int x, int lane) {
  for (int i = 1; i < kWarp; i *= 2) {
    int other = __shfl_up_sync(kAllLanes, x, i);
    if (lane >= i) x += other;
  }
  return x;
}

__global__ void __launch_bounds__(kThreads) SortPairsKernel(const SortPairs args) {
  __shared__ uint16_t before[kWarps][kMaxGroups];  // pairs of an expert in a warp's part; then in the parts before it
  __shared__ int begin[kMaxGroups], warp_total[kWarps];
  int thread = threadIdx.x, warp = thread / kWarp, lane = thread % kWarp;
  int pairs = static_cast<int>(args.pairs), experts = static_cast<int>(args.experts);
  int rounds = (pairs + kThreads - 1) / kThreads, first = warp * rounds * kWarp + lane;
  for (int e = lane; e < experts; e += kWarp) before[warp][e] = 0;
  for (int r = thread; r < pairs; r += kThreads) {
    args.token[r] = 0;
    args.row_weight[r] = 0;
  }
  __syncwarp();
  int expert[kMaxRounds], rank[kMaxRounds];
#pragma unroll
  for (int i = 0; i < kMaxRounds; ++i) {
    if (i >= rounds) break;
    int pair = first + i * kWarp, e = pair < pairs ? args.expert[pair] : -1;
    if (e >= experts) e = -1;
    uint32_t same = __match_any_sync(kAllLanes, e);
    int count = e < 0 ? 0 : before[warp][e], earlier = __popc(same & ((1u << lane) - 1));
    __syncwarp();
    if (e >= 0 && earlier == 0) before[warp][e] = static_cast<uint16_t>(count + __popc(same));
    __syncwarp();
    expert[i] = e;
    rank[i] = count + earlier;
  }
  __syncthreads();
  int size = 0;
  if (thread < experts) {
    for (auto& part : before) {
      int count = part[thread];
      part[thread] = static_cast<uint16_t>(size);
      size += count;
    }
    args.sizes[thread] = size;
  }
  int end = InclusiveSum(size, lane);
  if (lane == kWarp - 1) warp_total[warp] = end;
  __syncthreads();
  int total = InclusiveSum(warp_total[lane], lane);
  int warps_before = __shfl_sync(kAllLanes, total, max(warp - 1, 0));
  if (thread < experts) begin[thread] = end - size + (warp > 0 ? warps_before : 0);
  __syncthreads();
#pragma unroll
  for (int i = 0; i < kMaxRounds; ++i) {
    int pair = first + i * kWarp;
    if (i >= rounds || pair >= pairs) break;
    int row = pairs;
    if (int e = expert[i]; e >= 0) {
      row = begin[e] + before[warp][e] + rank[i];
      args.token[row] = pair / static_cast<int>(args.top);
      args.row_weight[row] = args.weight[pair];
    }
    args.row[pair] = row;
  }
}

}  // namespace

cudaError_t SortFewPairs(const SortPairs& call, cudaStream_t stream) {
  SortPairsKernel<<<1, kThreads, 0, stream>>>(call);
  return cudaGetLastError();
}

}  // namespace mla
