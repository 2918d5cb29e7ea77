// The kernel of quantize.h, at the speed of memory: 16 threads have a row's 128 columns, 8 each.

#include "quantize.h"

#include <cuda_bf16.h>
#include <cuda_fp8.h>

#include <algorithm>

namespace mla {
namespace {

constexpr int kThreads = 256;
constexpr int kPerThread = 8;
constexpr int kTeam = kScaleBlock / kPerThread;  // threads with a scale
constexpr float kLargest = 448;                  // of e4m3
constexpr float kLeast = 1e-30f;                 // model/fp8_rows.py

// 8 columns from `at` on, or zeros past the row's end.
__device__ void Load(const __nv_bfloat16* row, int at, bool in_row, float (&x)[kPerThread]) {
  uint4 words = in_row ? *reinterpret_cast<const uint4*>(row + at) : uint4{};
  auto* pairs = reinterpret_cast<const __nv_bfloat162*>(&words);
#pragma unroll
  for (int i = 0; i < kPerThread / 2; ++i) {
    float2 pair = __bfloat1622float2(pairs[i]);
    x[2 * i] = pair.x;
    x[2 * i + 1] = pair.y;
  }
}

template <bool kGated>
__global__ void __launch_bounds__(kThreads) QuantizeKernel(const Quantize args) {
  int columns = static_cast<int>(args.columns), blocks = (columns + kScaleBlock - 1) / kScaleBlock;
  int lane = threadIdx.x % kTeam;
  int64_t teams = static_cast<int64_t>(gridDim.x) * (kThreads / kTeam);
  auto* x = static_cast<const __nv_bfloat16*>(args.x);
  // All of a warp's threads take part in its shuffles, those of a team past the end too.
  int64_t count = args.rows * blocks, rounded = (count + 1) / 2 * 2;
  for (int64_t team = static_cast<int64_t>(blockIdx.x) * (kThreads / kTeam) + threadIdx.x / kTeam; team < rounded;
       team += teams) {
    int64_t row = min(team, count - 1) / blocks;
    int block = static_cast<int>(min(team, count - 1) % blocks), at = block * kScaleBlock + lane * kPerThread;
    bool in_row = at < columns;
    float value[kPerThread];
    if constexpr (kGated) {
      float up[kPerThread], weight = args.row_weights[row];
      const __nv_bfloat16* gate_up = x + row * 2 * columns;
      Load(gate_up, at, in_row, value);
      Load(gate_up + columns, at, in_row, up);
#pragma unroll
      for (int i = 0; i < kPerThread; ++i) value[i] = __fdividef(value[i], 1 + __expf(-value[i])) * up[i] * weight;
    } else {
      Load(x + row * columns, at, in_row, value);
    }
    float largest = kLeast;
#pragma unroll
    for (float v : value) largest = fmaxf(largest, fabsf(v));
#pragma unroll
    for (int i = 1; i < kTeam; i *= 2) largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, i));
    float inverse = kLargest / largest;
    __nv_fp8x2_storage_t q[kPerThread / 2];
#pragma unroll
    for (int i = 0; i < kPerThread / 2; ++i) {
      float2 pair{value[2 * i] * inverse, value[2 * i + 1] * inverse};
      q[i] = __nv_cvt_float2_to_fp8x2(pair, __NV_SATFINITE, __NV_E4M3);
    }
    if (team >= count) continue;
    if (in_row) {
      auto* to = static_cast<uint8_t*>(args.q) + row * columns + at;
      *reinterpret_cast<uint2*>(to) = *reinterpret_cast<const uint2*>(q);
    }
    if (lane == 0) args.scales[team] = largest / kLargest;
  }
}

}  // namespace

cudaError_t QuantizeRows(const Quantize& call, int num_sm, cudaStream_t stream) {
  constexpr int kBlocksPerSm = 8;  // 2048 threads
  int64_t teams = call.rows * ((call.columns + kScaleBlock - 1) / kScaleBlock);
  int64_t blocks = std::min<int64_t>((teams * kTeam + kThreads - 1) / kThreads, num_sm * kBlocksPerSm);
  auto* kernel = call.row_weights ? QuantizeKernel<true> : QuantizeKernel<false>;
  kernel<<<static_cast<unsigned>(blocks), kThreads, 0, stream>>>(call);
  return cudaGetLastError();
}

}  // namespace mla
