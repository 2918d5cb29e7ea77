// The kernel of add_norm.h: a block has a row, and keeps it in registers. It rounds where rms_norm (model/norm.py)
// does.

#include "add_norm.h"

#include <cuda_bf16.h>

#include <algorithm>

#include "../warp.h"

namespace mla {
namespace {

constexpr int kPerVector = 8;
constexpr int kMaxThreads = 1024;

// kVectors: of 8 columns, that a thread has at most.
template <int kVectors>
__global__ void __launch_bounds__(kMaxThreads) AddNormKernel(const AddNorm args) {
  __shared__ float warp_sum[kWarp];
  int vectors = static_cast<int>(args.columns) / kPerVector, lane = threadIdx.x % kWarp;
  int64_t row = static_cast<int64_t>(blockIdx.x) * vectors;
  auto* x = static_cast<const uint4*>(args.x) + row;
  auto* part = static_cast<const uint4*>(args.part) + row;
  auto* weight = static_cast<const uint4*>(args.weight) + static_cast<int64_t>(*args.layer) * vectors;
  uint4 sums[kVectors];
  float squares = 0;
#pragma unroll
  for (int i = 0; i < kVectors; ++i) {
    int at = i * blockDim.x + threadIdx.x;
    if (at >= vectors) break;
    uint4 b = part[at];
    sums[i] = x[at];
    auto* left = reinterpret_cast<__nv_bfloat162*>(&sums[i]);
    auto* right = reinterpret_cast<const __nv_bfloat162*>(&b);
#pragma unroll
    for (int j = 0; j < kPerVector / 2; ++j) {
      left[j] = __hadd2_rn(left[j], right[j]);
      float2 wide = __bfloat1622float2(left[j]);
      squares += wide.x * wide.x + wide.y * wide.y;
    }
    (static_cast<uint4*>(args.sum) + row)[at] = sums[i];
  }
  squares = WarpSum(squares);
  if (lane == 0) warp_sum[threadIdx.x / kWarp] = squares;
  __syncthreads();
  squares = WarpSum(lane < blockDim.x / kWarp ? warp_sum[lane] : 0);
  float scale = rsqrtf(squares / static_cast<float>(args.columns) + args.eps);
#pragma unroll
  for (int i = 0; i < kVectors; ++i) {
    int at = i * blockDim.x + threadIdx.x;
    if (at >= vectors) break;
    uint4 w = weight[at];
    auto* value = reinterpret_cast<__nv_bfloat162*>(&sums[i]);
    auto* factor = reinterpret_cast<const __nv_bfloat162*>(&w);
#pragma unroll
    for (int j = 0; j < kPerVector / 2; ++j) {
      float2 wide = __bfloat1622float2(value[j]);
      value[j] = __hmul2_rn(__floats2bfloat162_rn(wide.x * scale, wide.y * scale), factor[j]);
    }
    (static_cast<uint4*>(args.normed) + row)[at] = sums[i];
  }
}

}  // namespace

cudaError_t AddAndNorm(const AddNorm& call, cudaStream_t stream) {
  auto vectors = call.columns / kPerVector;
  auto threads = std::min<int64_t>((vectors + kWarp - 1) / kWarp * kWarp, kMaxThreads);
  auto* kernel = vectors <= kMaxThreads ? AddNormKernel<1> : AddNormKernel<kMaxNormed / kPerVector / kMaxThreads>;
  kernel<<<static_cast<unsigned>(call.rows), static_cast<unsigned>(threads), 0, stream>>>(call);
  return cudaGetLastError();
}

}  // namespace mla
