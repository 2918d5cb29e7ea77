#include "combine.h"

#include <cuda_bf16.h>

#include <algorithm>
#include <cmath>

#include "shapes.h"

namespace mla {
namespace {

constexpr int kClearThreads = 128;
// A block combines one token and head. kLanes threads cover the output, four elements each; kParts such groups take
// every kParts-th split, since the few tokens of long rows have many splits.
constexpr int kLanes = 128;
constexpr int kParts = 4;
constexpr int kCombineThreads = kLanes * kParts;
static_assert(kLanes * 4 == kLatent);
static_assert(kMaxSplits <= kCombineThreads, "one thread computes the weight of one split");

__global__ void ClearPaddingKernel(const int32_t* cu_q, int64_t rows, int64_t tokens, int64_t heads, int64_t width,
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

// Reduces over the first kMaxSplits threads, which are whole warps. All threads get the result.
template <typename Op>
__device__ float Reduce(float x, Op op, float* shared) {
  constexpr int warps = kMaxSplits / 32;
  if (threadIdx.x < kMaxSplits) {
    for (int i = 16; i > 0; i /= 2) x = op(x, __shfl_xor_sync(0xffffffff, x, i));
    if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = x;
  }
  __syncthreads();
  x = shared[0];
  for (int i = 1; i < warps; ++i) x = op(x, shared[i]);
  return x;
}

__global__ void CombineSplitsKernel(const int32_t* cu_q, const int32_t* num_splits, const int32_t* row_of, int rows,
                                    int tokens, int heads, const float* out_partial, const float* lse_partial,
                                    uint16_t* out, float* lse) {
  __shared__ float maxima[kMaxSplits / 32], sums[kMaxSplits / 32], weights[kMaxSplits];
  __shared__ float4 parts[kParts - 1][kLanes];
  __shared__ int count;
  int token = blockIdx.x, head = blockIdx.y, thread = threadIdx.x, lane = thread % kLanes, part = thread / kLanes;
  int64_t place = static_cast<int64_t>(head) * tokens + token;
  auto write = [&](float4 x) {
    __nv_bfloat162 pair[2] = {__floats2bfloat162_rn(x.x, x.y), __floats2bfloat162_rn(x.z, x.w)};
    *reinterpret_cast<uint2*>(out + place * kLatent + lane * 4) = *reinterpret_cast<uint2*>(pair);
  };
  if (thread == 0) count = 0;
  __syncthreads();
  for (int i = thread; i < rows; i += kCombineThreads) {
    int row = row_of[i];
    if (cu_q[row] <= token && token < cu_q[row + 1]) count = num_splits[i];  // at most one row has the token
  }
  __syncthreads();
  if (count == 0) {  // a padding token
    if (part == 0) write(make_float4(0, 0, 0, 0));
    if (thread == 0) lse[place] = -INFINITY;
    return;
  }
  if (count == 1) return;

  int64_t split_stride = static_cast<int64_t>(heads) * tokens;
  float split_lse = thread < count ? lse_partial[thread * split_stride + place] : -INFINITY;
  float max_lse = Reduce(split_lse, [](float a, float b) { return fmaxf(a, b); }, maxima);
  float weight = split_lse == -INFINITY ? 0.0f : expf(split_lse - max_lse);
  float total = Reduce(weight, [](float a, float b) { return a + b; }, sums);
  if (thread < kMaxSplits) weights[thread] = weight / total;
  if (thread == 0) lse[place] = max_lse + logf(total);
  __syncthreads();

  float4 sum = make_float4(0, 0, 0, 0);
  const float* partial = out_partial + place * kLatent + lane * 4;
#pragma unroll 4
  for (int s = part; s < count; s += kParts) {
    float w = weights[s];
    if (w != 0) {  // a split without keys did not write its output; NaN propagates
      float4 x = *reinterpret_cast<const float4*>(partial + s * split_stride * kLatent);
      sum.x += w * x.x;
      sum.y += w * x.y;
      sum.z += w * x.z;
      sum.w += w * x.w;
    }
  }
  if (part > 0) parts[part - 1][lane] = sum;
  __syncthreads();
  if (part > 0) return;
  for (int i = 0; i < kParts - 1; ++i) {
    float4 x = parts[i][lane];
    sum = make_float4(sum.x + x.x, sum.y + x.y, sum.z + x.z, sum.w + x.w);
  }
  write(sum);
}

}  // namespace

cudaError_t ClearPadding(const int32_t* cu_q, int64_t rows, int64_t tokens, int64_t heads, int64_t width, uint16_t* out,
                         int64_t token_stride, int64_t head_stride, float* lse, cudaStream_t stream) {
  int blocks = static_cast<int>(std::min<int64_t>(tokens, 1024));
  ClearPaddingKernel<<<blocks, kClearThreads, 0, stream>>>(cu_q, rows, tokens, heads, width, out, token_stride,
                                                           head_stride, lse);
  return cudaGetLastError();
}

cudaError_t CombineSplits(const int32_t* cu_q, const int32_t* num_splits, const int32_t* row_of, int64_t rows,
                          int64_t tokens, int64_t heads, const float* out_partial, const float* lse_partial,
                          uint16_t* out, float* lse, cudaStream_t stream) {
  dim3 grid(static_cast<unsigned>(tokens), static_cast<unsigned>(heads));
  CombineSplitsKernel<<<grid, kCombineThreads, 0, stream>>>(cu_q, num_splits, row_of, static_cast<int>(rows),
                                                            static_cast<int>(tokens), static_cast<int>(heads),
                                                            out_partial, lse_partial, out, lse);
  return cudaGetLastError();
}

}  // namespace mla
