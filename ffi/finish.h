// The kernels beside FA3's: what it leaves undone.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace mla {

// Zeros the output, and sets to -inf the log-sum-exp, of tokens that belong to no row: FA3 doesn't write them.
// `out` has `width` bfloat16 per token and head; strides are in numbers. lse is [heads, tokens].
cudaError_t ClearOutside(const int32_t* cu_q, int64_t rows, int64_t tokens, int64_t heads, int64_t width, uint16_t* out,
                         int64_t token_stride, int64_t head_stride, float* lse, cudaStream_t stream);

// Combines the splits of each token's row, and clears tokens of no row as above. Rows of one split have their output
// already. FA3's own combining kernel has a grid over rows x longest row, most of it idle when rows are many and short;
// this one's is over tokens.
// `splits` and `row_of` are the scheduler's: the splits of its i-th row, and which row that is.
cudaError_t CombineSplits(const int32_t* cu_q, const int32_t* splits, const int32_t* row_of, int64_t rows,
                          int64_t tokens, int64_t heads, const float* out_partial, const float* lse_partial,
                          uint16_t* out, float* lse, cudaStream_t stream);

}  // namespace mla
