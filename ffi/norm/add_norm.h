// A residual sum and its RMS norm (add_norm in model/norm.py).
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace mla {

constexpr int64_t kMaxNormed = 32768;  // columns

struct AddNorm {
  int64_t rows, columns;  // T, D
  float eps;
  const void* x;         // bfloat16 [T, D]
  const void* part;      // bfloat16 [T, D]
  const void* weight;    // bfloat16 [L, D]
  const int32_t* layer;  // [1]
  void* sum;             // bfloat16 [T, D]: x + part; may be x
  void* normed;          // bfloat16 [T, D]
};

cudaError_t AddAndNorm(const AddNorm& call, cudaStream_t stream);

}  // namespace mla
