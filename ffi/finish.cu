#include "finish.h"

#include <cuda_bf16.h>

#include <algorithm>
#include <cmath>

#include "shapes.h"

namespace mla {
namespace {

constexpr int kThreads = 128;
static_assert(kThreads * 4 == kLatent, "a thread combines four numbers");
static_assert(kThreads == kMostSplits, "a thread weighs one split");

__global__ void ClearOutsideKernel(const int32_t* cu_q, int64_t rows, int64_t tokens, int64_t heads, int64_t width,
                                   uint16_t* out, int64_t token_stride, int64_t head_stride, float* lse) {
  int64_t first = cu_q[0], last = cu_q[rows];
  int64_t vectors = width / 8;
  for (int64_t i = blockIdx.x; i < first + tokens - last; i += gridDim.x) {
    int64_t token = i < first ? i : last + (i - first);
    for (int64_t j = threadIdx.x; j < heads * vectors; j += blockDim.x) {
      uint16_t* at = out + token * token_stride + (j / vectors) * head_stride + (j % vectors) * 8;
      *reinterpret_cast<uint4*>(at) = make_uint4(0, 0, 0, 0);
    }
    for (int64_t head = threadIdx.x; head < heads; head += blockDim.x) lse[head * tokens + token] = -INFINITY;
  }
}

// The row of a token: the last one that begins at it or before; of equal ones the last, for the others are empty.
__device__ int RowOf(int token, const int32_t* cu_q, int rows) {
  int low = 0, high = rows;
  while (low < high) {
    int middle = (low + high) / 2;
    if (cu_q[middle + 1] <= token) low = middle + 1; else high = middle;
  }
  return low;
}

__device__ float BlockMax(float x, float* shared) {
  for (int i = 16; i > 0; i /= 2) x = fmaxf(x, __shfl_xor_sync(0xffffffff, x, i));
  if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = x;
  __syncthreads();
  return fmaxf(fmaxf(shared[0], shared[1]), fmaxf(shared[2], shared[3]));
}

__device__ float BlockSum(float x, float* shared) {
  for (int i = 16; i > 0; i /= 2) x += __shfl_xor_sync(0xffffffff, x, i);
  if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = x;
  __syncthreads();
  return (shared[0] + shared[1]) + (shared[2] + shared[3]);
}

__global__ void CombineSplitsKernel(const int32_t* cu_q, const int32_t* splits, const int32_t* row_of, int rows,
                                    int tokens, int heads, const float* out_partial, const float* lse_partial,
                                    uint16_t* out, float* lse) {
  __shared__ float maxima[4], sums[4], weights[kMostSplits];
  __shared__ int count;
  int token = blockIdx.x, head = blockIdx.y, thread = threadIdx.x;
  int64_t place = static_cast<int64_t>(head) * tokens + token;
  auto write = [&](float4 x) {
    __nv_bfloat162 pair[2] = {__floats2bfloat162_rn(x.x, x.y), __floats2bfloat162_rn(x.z, x.w)};
    *reinterpret_cast<uint2*>(out + place * kLatent + thread * 4) = *reinterpret_cast<uint2*>(pair);
  };
  if (token < cu_q[0] || token >= cu_q[rows]) {
    write(make_float4(0, 0, 0, 0));
    if (thread == 0) lse[place] = -INFINITY;
    return;
  }
  int row = RowOf(token, cu_q, rows);
  for (int i = thread; i < rows; i += kThreads) {
    if (row_of[i] == row) count = splits[i];
  }
  __syncthreads();
  if (count <= 1) return;

  int64_t step = static_cast<int64_t>(heads) * tokens;  // from a split to the next
  float mine = thread < count ? lse_partial[thread * step + place] : -INFINITY;
  float best = BlockMax(mine, maxima);  // finite: a token of a row sees at least one key
  float weight = mine == -INFINITY ? 0.0f : expf(mine - best);
  float total = BlockSum(weight, sums);
  weights[thread] = weight / total;
  __syncthreads();
  if (thread == 0) lse[place] = best + logf(total);

  float4 sum = make_float4(0, 0, 0, 0);
  const float* from = out_partial + place * kLatent + thread * 4;
#pragma unroll 4
  for (int s = 0; s < count; ++s) {
    float w = weights[s];
    if (w > 0) {  // a split that saw no key left its output unwritten
      float4 x = *reinterpret_cast<const float4*>(from + s * step * kLatent);
      sum.x += w * x.x;
      sum.y += w * x.y;
      sum.z += w * x.z;
      sum.w += w * x.w;
    }
  }
  write(sum);
}

}  // namespace

cudaError_t ClearOutside(const int32_t* cu_q, int64_t rows, int64_t tokens, int64_t heads, int64_t width, uint16_t* out,
                         int64_t token_stride, int64_t head_stride, float* lse, cudaStream_t stream) {
  int blocks = static_cast<int>(std::min<int64_t>(tokens, 1024));
  ClearOutsideKernel<<<blocks, kThreads, 0, stream>>>(cu_q, rows, tokens, heads, width, out, token_stride, head_stride,
                                                      lse);
  return cudaGetLastError();
}

cudaError_t CombineSplits(const int32_t* cu_q, const int32_t* splits, const int32_t* row_of, int64_t rows,
                          int64_t tokens, int64_t heads, const float* out_partial, const float* lse_partial,
                          uint16_t* out, float* lse, cudaStream_t stream) {
  dim3 grid(static_cast<unsigned>(tokens), static_cast<unsigned>(heads));
  CombineSplitsKernel<<<grid, kThreads, 0, stream>>>(cu_q, splits, row_of, static_cast<int>(rows),
                                                     static_cast<int>(tokens), static_cast<int>(heads), out_partial,
                                                     lse_partial, out, lse);
  return cudaGetLastError();
}

}  // namespace mla
