// Grouped products of many rows: out = rows x weights^T, each row with its group's matrix, all in FP8.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "shapes.h"

namespace mla {

struct W8A8 {
  int64_t rows, inputs, outputs;  // M, K, N
  int64_t matrices, groups;       // G, E
  const void* x;                  // float8_e4m3fn [M, K]
  const float* row_scales;        // [ceil(K / 128), M]
  const void* weights;            // float8_e4m3fn [G, N, K]
  const float* weight_scales;     // [G, ceil(N / 128), ceil(K / 128)]
  const int32_t* group_sizes;     // [E]
  const int32_t* first_matrix;    // [1]: that of group 0
  void* out;                      // bfloat16 [M, N]; rows past all groups are not written
};

cudaError_t MultiplyW8A8(const W8A8& call, int num_sm, cudaStream_t stream);

}  // namespace mla
