// The kernel of route.h: a warp has a token, a lane every 32nd expert.

#include "route.h"

#include <algorithm>
#include <cmath>

#include "../warp.h"

namespace mla {
namespace {

constexpr int kWarps = 4;

// Orders as the float does; NaN is the largest, as for jnp.argmax. 0 is below all of them.
__device__ uint32_t Order(float x) {
  if (isnan(x)) return kAllLanes;
  auto bits = __float_as_uint(x);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

__device__ float Max(float x) {
  for (int i = kWarp / 2; i > 0; i /= 2) x = fmaxf(x, __shfl_xor_sync(kAllLanes, x, i));
  return x;
}

template <int kPerLane>
struct Token {
  const Route& args;
  int lane = threadIdx.x % kWarp;
  float score[kPerLane];
  uint32_t order[kPerLane];  // of the scores that the choice is made by; 0: not to be chosen

  __device__ int Expert(int i) const { return i * kWarp + lane; }
  __device__ bool Exists(int i) const { return Expert(i) < args.experts; }

  __device__ void Load(int64_t token) {
    int experts = static_cast<int>(args.experts);
    const float* logits = args.logits + token * args.parts * experts;
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      score[i] = -INFINITY;
      if (!Exists(i)) continue;
      score[i] = logits[Expert(i)];
      for (int part = 1; part < args.parts; ++part) score[i] += logits[part * experts + Expert(i)];
    }
    if (args.sigmoid) {
#pragma unroll
      for (float& x : score) x = 1 / (1 + expf(-x));
    } else {
      Softmax();
    }
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      float bias = args.bias && Exists(i) ? args.bias[static_cast<int64_t>(*args.layer) * experts + Expert(i)] : 0;
      order[i] = Exists(i) ? Order(score[i] + bias) : 0;
    }
  }

  __device__ void Softmax() {
    float largest = -INFINITY, sum = 0;
#pragma unroll
    for (float x : score) largest = fmaxf(largest, x);
    largest = Max(largest);
#pragma unroll
    for (float& x : score) sum += x = expf(x - largest);
    sum = WarpSum(sum);
#pragma unroll
    for (float& x : score) x /= sum;
  }

  // Leaves the experts of the groups with the largest scores: of the largest expert, or of the two largest ones.
  __device__ void KeepGroups() {
    int size = static_cast<int>(args.experts / args.groups), groups = static_cast<int>(args.groups);
    float mine = -INFINITY;  // lane g has group g's score
    for (int g = 0; g < groups; ++g) {
      uint32_t first = 0, second = 0;
#pragma unroll
      for (int i = 0; i < kPerLane; ++i) {
        if (Expert(i) / size != g) continue;
        second = max(second, min(first, order[i]));
        first = max(first, order[i]);
      }
      uint32_t best = __reduce_max_sync(kAllLanes, first);
      float sum = Value(best);
      if (args.sigmoid) {  // the second: that of the one lane which has the first, or another lane's first
        int owner = __ffs(static_cast<int>(__ballot_sync(kAllLanes, first == best))) - 1;
        sum += Value(__reduce_max_sync(kAllLanes, lane == owner ? second : first));
      }
      if (lane == g) mine = sum;
    }
    uint32_t rank = 0, own = Order(mine);
    for (int g = 0; g < groups; ++g) {
      uint32_t other = __shfl_sync(kAllLanes, own, g);
      rank += other > own || (other == own && g < lane);
    }
    uint32_t kept = __ballot_sync(kAllLanes, lane < groups && rank < args.kept_groups);
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      if (Exists(i) && !(kept >> Expert(i) / size & 1)) order[i] = 0;
    }
  }

  __device__ static float Value(uint32_t order) {
    if (order == kAllLanes) return NAN;
    return __uint_as_float(order & 0x80000000u ? order & 0x7fffffffu : ~order);
  }

  // Lane j gets the j-th largest; of equal ones the first.
  __device__ void Choose(int& expert, float& weight) {
    for (int j = 0; j < args.top; ++j) {
      uint32_t best = 0, index = kAllLanes;
#pragma unroll
      for (int i = 0; i < kPerLane; ++i) {
        if (order[i] > best) best = order[i], index = Expert(i);
      }
      uint32_t largest = __reduce_max_sync(kAllLanes, best);
      index = __reduce_min_sync(kAllLanes, best == largest ? index : kAllLanes);
      float found = 0;
#pragma unroll
      for (int i = 0; i < kPerLane; ++i) {
        if (Expert(i) == index) found = score[i], order[i] = 0;
      }
      found = __shfl_sync(kAllLanes, found, index % kWarp);
      if (lane == j) expert = static_cast<int>(index), weight = found;
    }
  }
};

template <int kPerLane>
__global__ void __launch_bounds__(kWarps* kWarp) RouteKernel(const Route args) {
  int64_t at = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / kWarp;
  if (at >= args.tokens) return;
  Token<kPerLane> token{args};
  token.Load(at);
  if (args.groups > 1) token.KeepGroups();
  int expert = 0;
  float weight = 0;
  token.Choose(expert, weight);
  int lane = token.lane, top = static_cast<int>(args.top);
  if (args.normalize) weight /= WarpSum(lane < top ? weight : 0) + 1e-20f;
  weight *= args.scale;
  if (!args.valid[at]) expert = args.no_expert;
  int place = 0;  // in ascending order
  for (int j = 0; j < top; ++j) {
    int other = __shfl_sync(kAllLanes, expert, j);
    place += other < expert || (other == expert && j < lane);
  }
  if (lane >= top) return;
  args.expert[at * top + place] = expert;
  args.weight[at * top + place] = weight;
}

}  // namespace

cudaError_t RouteTokens(const Route& call, cudaStream_t stream) {
  auto* kernel = call.experts <= 64    ? RouteKernel<2>
                 : call.experts <= 160 ? RouteKernel<5>
                 : call.experts <= 256 ? RouteKernel<8>
                 : call.experts <= 384 ? RouteKernel<12>
                                       : RouteKernel<16>;
  auto blocks = static_cast<unsigned>((call.tokens + kWarps - 1) / kWarps);
  kernel<<<blocks, kWarps * kWarp, 0, stream>>>(call);
  return cudaGetLastError();
}

}  // namespace mla
