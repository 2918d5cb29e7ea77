// Grouped products of few rows: out = rows x weights^T, each row with its group's matrix, at the speed of reading each
// matrix that has rows once.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "shapes.h"

namespace mla {

// The format of the matrices.
enum class WeightFormat {
  kBf16,      // bfloat16
  kBlockFp8,  // float8_e4m3fn with a float32 scale for a block of outputs (a multiple of 64) and 128 inputs
  kGroupFp8,  // float8_e4m3fn with a bfloat16 scale for 32 inputs of one output
};

struct FewRows {
  WeightFormat format;
  int64_t rows, inputs, outputs;  // M, K, N
  int64_t matrices, groups;       // G, E
  int64_t block_outputs;          // of a scale; kBlockFp8 only
  // Rows that a group is expected to have at most: chooses tiles of 8, 32, 64 or 128. A group with more rows takes
  // several, and each reads the weights.
  int64_t max_rows;
  const void* x;                // bfloat16 [M, K]; for FP8 in the order of `interleave` (model/few_rows.py)
  const void* weights;          // [G, N, K]
  const void* scales;           // [G, ceil(N / block), ceil(K / block)]
  const int32_t* group_sizes;   // [E]
  const int32_t* first_matrix;  // [1]: that of group 0
  void* out;                    // bfloat16 [M, N]; rows past all groups are not written
};

cudaError_t MultiplyFewRows(const FewRows& call, int num_sm, cudaStream_t stream);

}  // namespace mla
